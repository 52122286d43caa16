#!/usr/bin/env bash
# Runs the tests on other versions of Python, PyTorch, Triton and transformers than constraints.txt names, and records
# what ran.
set -uo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/setup.sh"

# Name: the versions that differ from constraints.txt, and the Python where it is not the oldest that is supported.
# torch-2.11 is the oldest PyTorch and what machines with a GPU often have; torch-2.15 is what pip takes by itself.
ENVIRONMENTS="triton-3.6: triton==3.6.0
triton-3.9: triton==3.9.0
torch-2.11: python==3.12 torch==2.11.0 torchvision==0.26.0 triton==3.6.0 transformers==5.17.0
torch-2.14: torch==2.14.1 torchvision==0.29.1 triton==3.8.0 transformers==5.24.0
torch-2.15: python==3.13 torch==2.15.0 torchvision==0.29.2 triton==3.9.0 transformers==5.24.0
transformers-5.0: transformers==5.0.0 huggingface_hub==1.33.0 tokenizers==0.22.2"

usage() {
  cat <<'USAGE'
Usage: ./scripts/test_versions.sh [--no-report] [NAME ...]

Runs the tests on other versions than those of constraints.txt, and adds what passed to experiments/results/versions.json
and the table beside it. torch-* run the tests of the kernels, the encoders, the
compile scaffold, the experiments and the transformers integration; triton-* those of the kernels; transformers-* those of
its integration. All but the last also compile every configuration of attention, and say which figures differ from the
committed kernel report. Each NAME has a virtual environment of its own, .venv-NAME, made at the first call (several
minutes, 2 to 6 GB). No GPU is needed. 15 minutes (triton-*) to an hour (torch-*) a NAME on 2 cores.

  --no-report  only the tests
  NAME         one of those below (default: all of them); python==X is the command pythonX, unless PYTHON names one
USAGE
  printf '%s\n' "$ENVIRONMENTS" | sed 's/^/    /'
  cat <<'USAGE'

Each environment's tests.log and kernel_report.json are left in .venv-NAME.

exit status: 0 all tests passed in every environment; 1 some did not, or an environment could not be made;
2 bad arguments
USAGE
}

versions_of() {
  printf '%s\n' "$ENVIRONMENTS" | sed -n "s/^$1: //p"
}

# setup.sh makes whatever environment these name; its install_project is replaced by the next function.
use_environment() {
  local version
  OVERRIDES="$(versions_of "$1" | sed 's/python==[0-9.]* //')"
  version="$(versions_of "$1" | sed -n 's/^python==\([0-9.]*\).*/\1/p')"
  PYTHON="${GIVEN_PYTHON:-python$version}"
  if [ -z "$version" ] || ! command -v "$PYTHON" >/dev/null 2>&1; then PYTHON="${GIVEN_PYTHON:-python3}"; fi
  VENV="$PROJECT_ROOT/.venv-$1"
  VENV_PYTHON="$VENV/bin/python"
  STAMP="$VENV/.set-up-done"
}

# Triton comes last and without its dependents' consent: a CUDA build of PyTorch pins one version exactly.
# shellcheck disable=SC2317 # setup.sh calls it
install_project() {
  local constraints="$VENV/constraints.txt" pin triton=""
  cp "$PROJECT_ROOT/constraints.txt" "$constraints"
  for pin in $OVERRIDES; do
    sed -i.before "/^${pin%%==*}==/d" "$constraints"
    case "$pin" in triton==*) triton="$pin" ;; *) printf '%s\n' "$pin" >>"$constraints" ;; esac
  done
  (cd "$PROJECT_ROOT" && "$VENV_PYTHON" -m pip install --no-input -c "$constraints" -e '.[test]') &&
    { [ -z "$triton" ] || "$VENV_PYTHON" -m pip install --no-input --no-deps "$triton"; }
}

# Every test of a kernel or of what compiles it; those that need the encoder too stay out.
kernel_tests() {
  grep -lE '^ *(from|import) vit_kernels' tests/*/test_*.py | xargs grep -LE '^ *(from|import) vit_encoder' |
    grep -v test_kernel_report
}

# tests_of NAME: the files of the tests that its versions concern. The committed kernel report is of one version.
tests_of() {
  case "$1" in
    torch-*)
      ls tests/{kernels,compilation,encoder,experiments}/test_*.py tests/integrations/test_transformers_*.py |
        grep -v -e test_kernel_report -e test_vllm
      ;;
    transformers-*) ls tests/integrations/test_transformers_*.py ;;
    *) kernel_tests ;;
  esac
}

run_tests() {
  rm -f "$VENV/tests.xml"
  # shellcheck disable=SC2046 # names of tests have no spaces
  "$VENV_PYTHON" -m pytest -q -p no:cacheprovider -n auto --dist loadfile --no-loadscope-reorder \
    --junitxml="$VENV/tests.xml" $(tests_of "$1") 2>&1 | tee "$VENV/tests.log" >&2
  return "${PIPESTATUS[0]}"
}

make_report() {
  rm -f "$VENV/kernel_report.json"
  "$VENV_PYTHON" -m experiments.kernels --kernel varlen_attention --dtype bfloat16 --out "$VENV" \
    >"$VENV/kernel_report.txt" || return 1
  "$VENV_PYTHON" -m experiments.kernels.diff experiments/results/kernel_report.json "$VENV/kernel_report.json"
}

# "torch 2.13.0+cpu, triton 3.6.0", or nothing where the environment could not be made.
installed_versions() {
  "$VENV_PYTHON" -c 'import torch, triton; print(f"torch {torch.__version__}, triton {triton.__version__}")' 2>/dev/null
}

# try_environment NAME: prints its line of the summary; 1 when anything failed.
try_environment() {
  local tests report="not made" failed=0
  use_environment "$1"
  say ""
  say "== $1: $OVERRIDES"
  if ! (ensure_environment); then
    printf '%-12s %-34s %s\n' "$1" "-" "not set up, see above"
    return 1
  fi
  say "== $1: tests, log in $VENV/tests.log"
  run_tests "$1" || failed=1
  tests="$(tail -n 1 "$VENV/tests.log")"
  "$VENV_PYTHON" scripts/record_versions.py "$1" "$VENV/tests.xml" >&2 || failed=1
  if [ "$REPORT" = yes ] && [ "${1%%-*}" != transformers ]; then
    say "== $1: every configuration of attention; what differs from the committed report:"
    if make_report >&2; then report="made"; else report="failed, see above" failed=1; fi
  fi
  printf '%-12s %-34s tests: %s; report: %s\n' "$1" "$(installed_versions)" "$tests" "$report"
  return "$failed"
}

GIVEN_PYTHON="${PYTHON:-}"
REPORT=yes
NAMES=""
for argument in "$@"; do
  case "$argument" in
    -h | --help) usage && exit 0 ;;
    --no-report) REPORT=no ;;
    *)
      if [ -z "$(versions_of "$argument")" ]; then
        say "test_versions.sh: got $argument, expected --no-report or one of: $(printf '%s\n' "$ENVIRONMENTS" | sed 's/:.*//' | tr '\n' ' ')"
        exit 2
      fi
      NAMES="$NAMES $argument"
      ;;
  esac
done
[ -n "$NAMES" ] || NAMES="$(printf '%s\n' "$ENVIRONMENTS" | sed 's/:.*//')"

cd "$PROJECT_ROOT" || exit 1
export HYPOTHESIS_PROFILE="${HYPOTHESIS_PROFILE:-ci}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OPENBLAS_NUM_THREADS=1
# Its default changes between versions, and with it the code.
export TRITON_DEFAULT_FP_FUSION=1
status=0
summary=""
for name in $NAMES; do
  line="$(try_environment "$name")" || status=1
  summary="$summary$line
"
done
say ""
printf '%s' "$summary"
exit "$status"
