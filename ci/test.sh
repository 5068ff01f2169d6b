#!/usr/bin/env bash
# The tests, on a machine without a GPU: install, then the CPU backends in one process; in another Triton in its interpreter, then every GPU kernel compiled ahead of time.
# Arguments go to pytest. A GPU machine runs ci/gpu.sh.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install -e ".[test]"
install --no-deps triton==3.6.0
tests=("$venv/bin/python" -m pytest tests) log="$(mktemp)" status=0
{ TRITON_INTERPRET=1 "${tests[@]}" -m "interp and not slow" "$@" && "${tests[@]}" -m "aot and not slow" "$@"; } > "$log" 2>&1 &  # beside the CPU's, which seldom keep two cores busy; shown after them
"${tests[@]}" -m "not interp and not aot and not gpu and not slow" "$@" || status=$?
wait $! || status=$?
cat "$log"; rm "$log"
exit "$status"
