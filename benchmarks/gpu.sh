#!/usr/bin/env bash
# Tests and measures fastlayers on a Linux machine with one NVIDIA GPU; no network is needed.
#
#   benchmarks/gpu.sh test|sanitize|bench|profile
#
# A stage ends within 8 minutes. What it has done it does not do again: repeat it until it says "complete". It needs
# python with torch for CUDA, pytest, pytest-timeout, hypothesis, expecttest and what fastlayers[bench] asks for.
# fastlayers comes from WHEEL=FILE, or from what is installed, or is built from this tree (cmake, ninja, setuptools, a
# C++20 compiler and nvcc). Results go to OUT, by default gpu-results: a page, records, and a log for each step.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-gpu-results}
budget=${SECONDS_PER_STAGE:-440}
mkdir -p "$out"
out=$(cd "$out" && pwd)
# -P: what is installed, not the package's source in this folder.
python=("${PYTHON:-python3}" -P)

fail() {
  echo "$1" >&2
  exit 1
}

install() {
  if [ -n "${WHEEL:-}" ]; then
    [ -d "$out/site" ] || "${python[@]}" -m pip install -q --no-deps --no-index --target "$out/site" "$WHEEL" ||
      fail "could not install $WHEEL"
    export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
  elif ! "${python[@]}" -c "import fastlayers" 2>/dev/null; then
    FASTLAYERS_CUDA=1 timeout "$budget" "${python[@]}" -m pip install -q --no-build-isolation --no-deps -e . ||
      fail "could not build fastlayers from this tree"
  fi
  "${python[@]}" -m fastlayers info >"$out/info.txt" || fail "fastlayers does not work: see $out/info.txt"
  "${python[@]}" -c "
import torch, fastlayers as fl
assert torch.cuda.is_available(), 'torch sees no GPU'
assert fl.backends.serving(torch.empty(1, 1, device='cuda')) == 'cuda', fl.backends.explain()" ||
    fail "the CUDA kernels would not run: see $out/info.txt"
}

left() { echo $((budget - SECONDS)); }

# step NAME COMMAND...: runs it unless an earlier call did, within what is left of the stage. Its log is NAME.log; a line
# in stage.txt tells how it ended.
step() {
  local name=$1 status
  shift
  if [ -e "$dir/$name.done" ]; then return; fi
  if [ "$(left)" -lt 20 ]; then
    complete=0
    return
  fi
  timeout --kill-after=10 "$(left)" "$@" >"$dir/$name.log" 2>&1
  status=$?
  if [ $status -eq 124 ] && [ ! -e "$dir/$name.interrupted" ]; then
    touch "$dir/$name.interrupted" # once more, with a whole stage's time
    complete=0
    return
  fi
  touch "$dir/$name.done"
  echo "$name: $([ $status -eq 0 ] && echo passed || echo "failed ($status): $(tail -1 "$dir/$name.log")")" |
    tee -a "$dir/stage.txt"
}

# Everything that takes a device; the other tests are not about GPUs.
device_tests() { grep -lE "\bdevice: torch.device" tests/test_*.py; }

stage_test() {
  local file
  for file in $(device_tests); do
    step "$(basename "$file" .py)" "${python[@]}" -m pytest -q --device=cuda -p no:cacheprovider "$file"
  done
}

# One test of each kind, small: compute-sanitizer is slow. Its first words tell whether the machine allows it.
stage_sanitize() {
  local tool refusal
  if ! command -v compute-sanitizer >/dev/null; then
    echo "refused: compute-sanitizer is not installed" | tee "$dir/stage.txt"
    return
  fi
  if ! refusal=$(compute-sanitizer --error-exitcode 1 "${python[@]}" -c \
    "import torch; torch.ones(1, device='cuda').item()" 2>&1); then
    echo "refused: $(grep -m1 -i error <<<"$refusal")" | tee "$dir/stage.txt"
    return
  fi
  # Without torch's cache of memory, so that each tensor ends where its memory does.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck synccheck; do
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-name kernel_substring=fastlayers \
      "${python[@]}" -m pytest -q --device=cuda -p no:cacheprovider tests/test_cuda_device.py -k "each_path"
  done
}

# A process for each case, so that the stage can go on where it ended.
stage_bench() {
  local name graphs tuned
  for name in $("${python[@]}" -c "
from fastlayers_benchmarks.cases import grid
print(*(case.name for case in grid('gpu')))"); do
    tuned=()
    case $name in 128x128x16x16-*) tuned=(--contender compile-max-autotune) ;; esac
    graphs=(--contender eager-graph --contender compile-graph --contender fastlayers-cuda-graph)
    step "$name" "${python[@]}" -m fastlayers bench --device cuda --gpu --no-steps --phase forward+backward \
      --contender compile --contender fastlayers-cuda --contender fastlayers-then-pool "${graphs[@]}" "${tuned[@]}" \
      --only "^$name\$" --json "$dir/$name.json"
  done
  local records=()
  for name in "$dir"/*.json; do records+=(--load "$name"); done
  "${python[@]}" -m fastlayers bench "${records[@]}" --markdown "$out/gpu-layers.md" --plots "$out/gpu-layers" \
    >"$dir/report.log" 2>&1 || fail "no page could be made: see $dir/report.log"
}

# The case whose time is furthest from that of its design's passes at the speed of a copy, as `bench` found it.
stage_profile() {
  local records=("$out"/bench/*.json)
  [ -e "${records[0]}" ] || fail "run the stage bench first"
  step torch-profiler "${python[@]}" -m fastlayers_benchmarks.profiling "${records[@]}"
  if ! command -v ncu >/dev/null; then
    echo "refused: ncu is not installed" | tee -a "$dir/stage.txt"
    return
  fi
  step ncu ncu --set full --kernel-name regex:fastlayers --launch-count 4 --force-overwrite --export "$dir/slowest" \
    --page details "${python[@]}" -m fastlayers_benchmarks.profiling --once "${records[@]}"
}

stage=${1:-}
case $stage in test | sanitize | bench | profile) ;; *) fail "usage: benchmarks/gpu.sh test|sanitize|bench|profile" ;; esac
dir=$out/$stage
mkdir -p "$dir"
complete=1
install
"stage_$stage"
if [ $complete -eq 1 ]; then echo "$stage: complete"; else echo "$stage: not complete, run it again"; fi
! grep -qs ": failed" "$dir/stage.txt"
