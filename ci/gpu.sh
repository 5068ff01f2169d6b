#!/usr/bin/env bash
# The same suite on a GPU machine, in parts of under nine minutes each. Uses $PYTHON (python3), which must have torch, triton, cupy, numba, ml_dtypes, pyyaml, pytest,
# pytest-xdist, pytest-timeout and hypothesis; `tune` takes optuna where it is. What a wheel brings may come by PYTHONPATH; nothing is installed here.
#   ci/gpu.sh tests [--shard 1/3] [pytest arguments]   every test that runs a Triton or CuPy kernel, on the chip
#   ci/gpu.sh report                                   all parts that ran, as one text: $RESULTS/<gpu>-tests.txt
#   ci/gpu.sh sanitize                                 CuPy kernels with garbage indices under compute-sanitizer memcheck (says so where the tool is missing)
#   ci/gpu.sh sanitize paths [cupy|triton] [--only NAME ...]  the same for paths of one architecture, pages, caches and selectors
#   ci/gpu.sh sanitize races [cupy|triton]             racecheck of the kernels that it understands (ci/sanitize_paths.py says which)
#   ci/gpu.sh uneven [--count 1000]                    random layouts of very uneven rows through the ordered backward, beside a kernel that occupies 16 multiprocessors too
#   ci/gpu.sh tune [tune arguments]                    profiles/ for this GPU; names of workloads or kernels keep a part short, --storage lets it go on
#   ci/gpu.sh bench [table arguments]                  the table of all kernels beside their peers, and $RESULTS/<gpu>-table.jsonl
#   ci/gpu.sh attention [its arguments]                block attention alone: every pattern at three lengths, 32 and 8 key heads, FlexAttention too (--share 1/4 and so on, one of four GPUs each); the same file
#   ci/gpu.sh host                                     what a call costs the host
# Compiled kernels are kept in .gpu-cache between parts (and may be carried to another machine of the kind). Unless they are set, $RESULTS is bench/results, and
# $PARTS, where pytest's JUnit files of the parts lie, .gpu-cache/tests; `python -m sparsetile.ci.report *.xml` joins parts anywhere.
set -euo pipefail
cd "$(dirname "$0")/.."
part="${1:-tests}"
[ $# -gt 0 ] && shift
python="${PYTHON:-python3}"
results="${RESULTS:-bench/results}" parts="${PARTS:-.gpu-cache/tests}"
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
export SPARSETILE_CACHE_DIR="${SPARSETILE_CACHE_DIR:-$PWD/.gpu-cache/sparsetile}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$PWD/.gpu-cache/triton}" TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$PWD/.gpu-cache/inductor}"
gpu() { "$python" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-"))'; }
report() { mkdir -p "$results"; "$python" -m sparsetile.ci.report "$parts"/*.xml | tee "$results/$(gpu)-tests.txt"; }
case "$part" in
  tests)
    shard=1/1
    if [ "${1:-}" = --shard ]; then shard="$2"; shift 2; fi
    rm -f $(ls "$parts"/*.xml 2>/dev/null | grep -v -e "-of-${shard#*/}.xml$" || true)
    status=0
    "$python" -m pytest tests -m "not aot" -k "triton or cupy or gpu" --ignore-glob "*_on_cpu.py" -n "${JOBS:-8}" --dist worksteal --timeout 300 --tb short --continue-on-collection-errors \
      --ignore tests/test_profiles.py --shard "$shard" --junitxml "$parts/${shard/\//-of-}.xml" -o junit_suite_name="$("$python" -m sparsetile.ci.report --machine)" "$@" || status=$?
    report || true
    exit "$status" ;;
  report) report ;;
  sanitize)
    tool="$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)"
    if [ ! -x "$tool" ]; then echo "compute-sanitizer is not on this machine: guard bands and poisoned memory in tests/test_garbage.py are what was checked"; exit 0; fi
    program=sanitize check=memcheck
    case "${1:-}" in
      paths) program=sanitize_paths; shift ;;
      races) program=sanitize_paths check=racecheck; shift; set -- "$@" --portable ;;
    esac
    CUPY_CUDA_PER_THREAD_DEFAULT_STREAM=0 PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$check" --error-exitcode 9 "$python" -m "sparsetile.ci.$program" "$@" ;;
  uneven) "$python" -m sparsetile.ci.uneven "$@" ;;
  tune) "$python" -m sparsetile tune --device 0 --profiles profiles "$@" ;;
  bench) "$python" -m sparsetile.bench.gpu_table --out "$results/$(gpu)-table.jsonl" "$@" ;;
  attention) "$python" -m sparsetile.bench.block_attention --out "$results/$(gpu)-table.jsonl" "$@" ;;
  host) "$python" -m sparsetile.bench.host "$@" ;;
  *) echo "ci/gpu.sh: expected tests, report, sanitize, uneven, tune, bench, attention or host, got $part" >&2; exit 2 ;;
esac
