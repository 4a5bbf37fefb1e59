# Checks the torch that the op library is built against.

# The oldest torch that the built library runs with: it uses no function of the stable ABI younger than this.
set(FASTLAYERS_TORCH_TARGET 2.11)
set(FASTLAYERS_TORCH_TARGET_HEX 0x020b000000000000)

if(NOT EXISTS "${FASTLAYERS_TORCH_ROOT}/version.py")
  message(FATAL_ERROR "FASTLAYERS_TORCH_ROOT='${FASTLAYERS_TORCH_ROOT}' is no torch package. "
    "It is the folder that `import torch, os; print(os.path.dirname(torch.__file__))` prints.")
endif()
file(STRINGS "${FASTLAYERS_TORCH_ROOT}/version.py" line REGEX "^__version__ = ")
string(REGEX REPLACE "^__version__ = '(.*)'$" "\\1" FASTLAYERS_TORCH_VERSION "${line}")
if(FASTLAYERS_TORCH_VERSION VERSION_LESS FASTLAYERS_TORCH_TARGET)
  message(FATAL_ERROR "fastlayers needs torch ${FASTLAYERS_TORCH_TARGET} or newer; "
    "found torch ${FASTLAYERS_TORCH_VERSION} in ${FASTLAYERS_TORCH_ROOT}. To upgrade it:\n"
    "  pip install --upgrade \"torch>=${FASTLAYERS_TORCH_TARGET}\"")
endif()
