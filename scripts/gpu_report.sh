#!/usr/bin/env bash
# Reports on this machine's GPU: ./scripts/gpu_report.sh [--help] [--out FOLDER]
#
# Where python3 (or PYTHON) has PyTorch for a GPU and Triton already, that Python runs it: nothing is installed, nothing
# is fetched. Elsewhere the project is set up first.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/setup.sh"

# has_gpu_stack PYTHON: new enough, with a PyTorch built for CUDA or ROCm, and Triton. Imports neither: that takes long.
has_gpu_stack() {
  check_python "$1" >/dev/null 2>&1 && "$1" -P - <<'PYTHON' >/dev/null 2>&1
import importlib.util, pathlib, runpy, sys
torch = importlib.util.find_spec("torch")
if torch is None or importlib.util.find_spec("triton") is None:
    sys.exit(1)
built_for = runpy.run_path(str(pathlib.Path(torch.submodule_search_locations[0], "version.py")))
sys.exit(not (built_for.get("cuda") or built_for.get("hip")))
PYTHON
}

python="${PYTHON:-python3}"
if has_gpu_stack "$python"; then
  say "$python has PyTorch and Triton: nothing is installed"
else
  say "$python has no PyTorch for a GPU, or no Triton: the project is set up in $VENV"
  ensure_environment
  python="$VENV_PYTHON"
fi
# As in run.sh: paths among the arguments are relative to the folder of the call, where nothing is imported from.
export PYTHONPATH="$PROJECT_ROOT:$PROJECT_ROOT/kernels:$PROJECT_ROOT/encoder${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -P -m experiments.gpu "$@"
