#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, operator tests on the device, compute-sanitizer, launches and graph
# capture, the whole job against the CPU, benchmarks. Writes one folder. Needs Python >= 3.10 with a CUDA build of torch
# >= 2.10, and nvcc.
#   bench/gpu.sh [RESULTS_FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-out/gpu}
python=${PYTHON:-python3}
mkdir -p "$results"
results=$(cd "$results" && pwd)
failed=0

step() {  # step NAME COMMAND…: its output goes to NAME.txt; a failure is noted and the rest goes on
  local name=$1
  shift
  echo "== $name"
  if "$@" >"$results/$name.txt" 2>&1; then echo "   ok"; else
    echo "   FAILED (rc $?): $results/$name.txt"
    tail -n 5 "$results/$name.txt" | sed 's/^/   /'
    failed=1
  fi
}

if [ -z "${CUDA_HOME:-}" ]; then  # an nvcc on the PATH may be a wrapper: the toolkit's own folder comes first
  if [ -x /usr/local/cuda/bin/nvcc ]; then CUDA_HOME=/usr/local/cuda; else CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")"); fi
  export CUDA_HOME
fi
step versions "$python" -c 'import sys, torch; print(sys.version); print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())'
step packages "$python" -m pip install --quiet setuptools ninja wheel pytest pytest-timeout pytest-benchmark hypothesis matplotlib
step build env MINEXP_BUILD=1 MINEXP_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps -e .
step loaded "$python" -c 'from minexp._ops import kernel_status; s = kernel_status(); print(s); assert s["cuda"], s'
step tests "$python" -m pytest -q -o addopts= -p no:cacheprovider tests/test_ops_kl.py tests/test_ops_edges.py
step device "$python" bench/gpu/checks.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" bench/gpu/checks.py --small
  done
else
  echo "== compute-sanitizer is not installed: skipped" | tee "$results/sanitizer.txt"
fi
step job "$python" -m pytest -q -o addopts= -p no:cacheprovider tests/test_cuda.py
step bench "$python" bench/kernels.py --full --out "$results"
echo "== results in $results"
exit $failed
