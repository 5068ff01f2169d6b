# Sourced by demo.sh and test.sh: a virtual environment in .venv (or $SPARSETILE_VENV) with the package and one extra.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${SPARSETILE_VENV:-.venv}"
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c ci/constraints.txt "$@"; }
