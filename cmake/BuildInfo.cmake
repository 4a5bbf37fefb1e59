# Writes build_info.json, by which the installed package knows how it was built.

function(json_array result)
  list(JOIN ARGN "\", \"" joined)
  if(NOT joined STREQUAL "")
    set(joined "\"${joined}\"")
  endif()
  set(${result} "[${joined}]" PARENT_SCOPE)
endfunction()

json_array(isas ${FASTLAYERS_ISAS})
json_array(cuda_archs ${FASTLAYERS_CUDA_ARCHS})
fastlayers_cuda_targets(cuda_targets ${FASTLAYERS_CUDA_ARCHS})
json_array(cuda_targets ${cuda_targets})
configure_file(cmake/build_info.json.in build_info.json @ONLY)
