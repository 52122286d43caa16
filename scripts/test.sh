#!/usr/bin/env bash
# Sets the project up if needed and runs the tests: ./scripts/test.sh [--quick] [pytest arguments]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/setup.sh"

usage() {
  cat <<USAGE
Usage: ./scripts/test.sh [--quick] [pytest arguments]

Sets up .venv if needed and runs the whole suite, or the files, folders and tests that the arguments name, relative to
the project's folder. Files are spread over one worker for each core (pytest-xdist), as far as memory lasts. -n 0, or
-p no:xdist, keeps all tests in one process; so do --pdb, --trace, -s and the name of a single file.

  --quick  what to run before a commit, two minutes of CPU time: the linter and the formatter, the import graph, and
           three examples of each property that says what an op or an encoder computes (the tests marked quick)

pytest's own options: .venv/bin/python -m pytest --help
USAGE
}

quick=""
case "${1:-}" in
  -h | --help) usage && exit 0 ;;
  --quick) quick=yes && shift ;;
esac

ensure_environment
cd "$PROJECT_ROOT"

if [ -n "$quick" ]; then
  "$VENV_PYTHON" -m ruff check
  "$VENV_PYTHON" -m ruff format --check
  export HYPOTHESIS_PROFILE="${HYPOTHESIS_PROFILE:-quick}"
  set -- -m quick "$@"
fi

export HYPOTHESIS_PROFILE="${HYPOTHESIS_PROFILE:-ci}"
# One thread a pool. Tests use small tensors, and the interpreted kernels thousands of tiny NumPy calls:
# waking a second thread costs more than it computes, and the pools of OpenMP, OpenBLAS and Inductor's compiler
# would compete with the other workers. One thread also fixes the order of every sum.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-1}"

# A file stays whole, so that what its tests share is made once. The files marked costly begin.
workers=(-n auto --dist loadfile --no-loadscope-reorder)
for argument in "$@"; do
  # These options are unknown where the plugin is turned off.
  case "$argument" in no:xdist | -pno:xdist) workers=() ;; esac
done
exec "$VENV_PYTHON" -m pytest ${workers[@]+"${workers[@]}"} "$@"
