#!/usr/bin/env bash
# Sets the project up if needed and runs the tests: ./scripts/test.sh [pytest arguments]
# Test files among the arguments are relative to the project's folder. Without arguments: the whole suite.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/setup.sh"

ensure_environment

export HYPOTHESIS_PROFILE="${HYPOTHESIS_PROFILE:-ci}"
# One thread a pool. Tests use small tensors, and the interpreted kernels thousands of tiny NumPy calls:
# waking a second thread costs more than it computes, and on 2 cores the pools of OpenMP, OpenBLAS and
# Inductor's compiler would compete. One thread also fixes the order of every sum.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-1}"

cd "$PROJECT_ROOT"
exec "$VENV_PYTHON" -m pytest "$@"
