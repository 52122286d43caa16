#!/usr/bin/env bash
# Sets the project up if needed and reports on this machine's GPU: ./scripts/gpu_report.sh [--help] [--out FOLDER]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/setup.sh"

ensure_environment
# As in run.sh: paths among the arguments are relative to the folder of the call, where nothing is imported from.
export PYTHONPATH="$PROJECT_ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$VENV_PYTHON" -P -m experiments.gpu "$@"
