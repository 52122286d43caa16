#!/usr/bin/env bash
# Sets the project up if needed and runs the main job: ./scripts/run.sh [arguments of experiments.encode]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/setup.sh"

ensure_environment
# -P and PYTHONPATH instead of cd: paths among the arguments are relative to the folder of the call,
# and nothing in that folder is imported.
export PYTHONPATH="$PROJECT_ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$VENV_PYTHON" -P -m experiments.encode "$@"
