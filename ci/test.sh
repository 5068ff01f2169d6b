#!/usr/bin/env bash
# The tests, on a machine without a GPU: install, then three processes: the CPU backends; Triton in its interpreter; every GPU kernel compiled ahead of time.
# Arguments go to pytest. A GPU machine runs ci/gpu.sh.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install -e ".[test]"
install --no-deps triton==3.6.0
"$venv/bin/python" -m pytest tests -m "not interp and not aot and not gpu and not slow" "$@"
TRITON_INTERPRET=1 "$venv/bin/python" -m pytest tests -m "interp and not slow" "$@"
"$venv/bin/python" -m pytest tests -m "aot and not slow" "$@"
