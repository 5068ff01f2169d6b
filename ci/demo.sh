#!/usr/bin/env bash
# The main job: install and run `sparsetile demo`. Arguments go to the demo.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install ".[demo]"
"$venv/bin/sparsetile" demo "$@"
