#!/usr/bin/env bash
# The same suite on a GPU machine, in parts of under nine minutes each. Uses $PYTHON (python3), which must have torch, triton, cupy, pytest and hypothesis.
#   ci/gpu.sh tests [pytest arguments]      every test that runs a Triton or CuPy kernel, on the chip
#   ci/gpu.sh sanitize                      CuPy kernels with garbage indices under compute-sanitizer memcheck (says so where the tool is missing)
#   ci/gpu.sh tune [tune arguments]         profiles/ for this GPU
#   ci/gpu.sh bench [table arguments]       the table of all kernels beside their peers
# Compiled kernels are kept in .gpu-cache between parts (and may be carried to another machine of the kind).
set -euo pipefail
cd "$(dirname "$0")/.."
part="${1:-tests}"
[ $# -gt 0 ] && shift
python="${PYTHON:-python3}"
export SPARSETILE_CACHE_DIR="${SPARSETILE_CACHE_DIR:-$PWD/.gpu-cache/sparsetile}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$PWD/.gpu-cache/triton}"
case "$part" in
  tests) "$python" -m pytest tests -m "not aot" -k "triton or cupy or gpu" --ignore-glob "*_on_cpu.py" -n "${JOBS:-8}" --dist worksteal "$@" ;;
  sanitize)
    tool="$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)"
    if [ ! -x "$tool" ]; then echo "compute-sanitizer is not on this machine: guard bands and poisoned memory in tests/test_garbage.py are what was checked"; exit 0; fi
    CUPY_CUDA_PER_THREAD_DEFAULT_STREAM=0 PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool memcheck --error-exitcode 9 "$python" -m sparsetile.ci.sanitize "$@" ;;
  tune) "$python" -m sparsetile tune --device 0 --profiles profiles "$@" ;;
  bench) "$python" -m sparsetile.bench.gpu_table "$@" ;;
  *) echo "ci/gpu.sh: expected tests, sanitize, tune or bench, got $part" >&2; exit 2 ;;
esac
