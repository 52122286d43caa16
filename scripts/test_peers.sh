#!/usr/bin/env bash
# Runs the own test suites of transformers, vLLM and flash-attention on ours: ./scripts/test_peers.sh [options]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/setup.sh"

usage() {
  cat <<'USAGE'
Usage: ./scripts/test_peers.sh [--transformers FOLDER] [--vllm FOLDER] [--flash-attn FOLDER] [--only SUITE] [--out FOLDER]

Runs the peers' own test suites with ours in their place, and compares test by test with the peer alone. The suites
come from the source distributions of the package index, kept in .peers, or from checkouts; none of them is committed.
What ours refuses stands in tests/peers/allowed.toml, with its reason. The last result of each suite is in
experiments/results/peers.md. No GPU is needed; vLLM's suite makes .venv-vllm as ./scripts/test_vllm.sh does (4 GB).
Under 20 minutes on 2 cores without checkouts.

  --transformers FOLDER  a checkout of transformers, of the installed version: the models' own suites run too
  --vllm FOLDER          a checkout of vLLM
  --flash-attn FOLDER    a checkout of flash-attention
  --only SUITE           only this suite; again for more of them. One of:
                           transformers-common   its common tests, on small vision encoders, with vit_varlen and
                                                 after apply_to_llama4 and apply_to_qwen2_5_vl
                           transformers-models   the suites of Llama 4, Qwen2.5-VL, SigLIP, CLIP and Pixtral, so
                                                 too (only with a checkout)
                           qwen-image-processor  that of Qwen2.5-VL's images, on patch_image (only with a checkout)
                           sweep                 every vision class of transformers, sdpa against vit_varlen
                           vllm                  test_mha_attn on our attention
                           flash-attn            the tests of variable lengths, on varlen_attention
  --out FOLDER           where peers.json and peers.md are written (default: experiments/results)

exit status: 0 every test that passes with the peer alone passes with ours or is allowed; 1 some do not, an entry of
allowed.toml is out of date, or a suite could not be run; 2 bad arguments
USAGE
}

for argument in "$@"; do
  case "$argument" in
    -h | --help) usage && exit 0 ;;
  esac
done

ensure_environment
# Folders among the arguments are relative to where this is called from, which may hold another package of that name.
PYTHONPATH="$PROJECT_ROOT" exec "$VENV_PYTHON" -P -m tests.peers "$@"
