# shellcheck shell=bash
# Sourced by run.sh and test.sh: makes .venv once, with the versions of constraints.txt.
#
# PYTHON=/path/to/python picks the interpreter that .venv is made from (default: python3).
# Written for bash 3.2 and BSD tools too.

MINIMUM_PYTHON="3.11"
PROJECT_ROOT="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$PROJECT_ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"
STAMP="$VENV/.set-up-done"

say() { printf '%s\n' "$*" >&2; }

# set_up_step NAME REPAIR COMMAND...: runs the command, or says how to repair it and exits with its code.
set_up_step() {
  local name="$1" repair="$2" code=0
  shift 2
  say "set-up: $name"
  # The job's standard output stays free of what pip prints.
  "$@" >&2 || code=$?
  if [ "$code" -ne 0 ]; then
    say ""
    say "set-up failed with exit code $code at the step: $name"
    say "to repair it: $repair"
    exit "$code"
  fi
}

# check_python PYTHON: it starts and is new enough.
check_python() {
  "$1" - "$MINIMUM_PYTHON" <<'PYTHON'
import sys
if sys.version_info < tuple(int(part) for part in sys.argv[1].split(".")):
    sys.exit(sys.executable + " is Python " + sys.version.split()[0])
PYTHON
}

# A venv interrupted while it was made, or whose interpreter was removed, has no python or no pip that starts.
venv_works() {
  check_python "$VENV_PYTHON" >/dev/null 2>&1 && "$VENV_PYTHON" -m pip --version >/dev/null 2>&1
}

make_venv() {
  "$PYTHON" -m venv --clear "$VENV"
}

install_project() {
  # From within the folder, so that no character of its path can be read as part of a requirement.
  (cd "$PROJECT_ROOT" && "$VENV_PYTHON" -m pip install --no-input -c constraints.txt -e '.[dev]')
}

# The project's own packages are only looked up: an error in their source is none of the set-up's.
check_imports() {
  (cd / && "$VENV_PYTHON" -c 'import torch, numpy, PIL, pytest
from importlib.util import find_spec
missing = [name for name in ("vit_kernels", "vit_encoder") if find_spec(name) is None]
raise SystemExit(f"not installed: {missing}" if missing else 0)')
}

# What an installed environment depends on. The folder counts: an editable install names it, so a copied tree
# would go on importing the original.
fingerprint() {
  "$VENV_PYTHON" - "$PROJECT_ROOT" <<'PYTHON' 2>/dev/null
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{sys.version} {root}".encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PYTHON
}

is_set_up() {
  local now
  [ -f "$STAMP" ] && now="$(fingerprint)" && [ "$now" = "$(cat "$STAMP")" ]
}

write_stamp() {
  fingerprint >"$STAMP.new" && mv -f "$STAMP.new" "$STAMP"
}

set_up() {
  PYTHON="${PYTHON:-python3}"
  local again="remove $VENV and run this again"
  if ! venv_works; then
    if [ -d "$VENV" ]; then
      say "set-up: $VENV is half made, broken or older than Python $MINIMUM_PYTHON, so it is made anew"
    fi
    set_up_step "find Python $MINIMUM_PYTHON or newer (trying: $PYTHON)" \
      "install Python $MINIMUM_PYTHON or newer, or name one: PYTHON=/path/to/python $0" check_python "$PYTHON"
    set_up_step "make the virtual environment $VENV" \
      "see the message above (Debian and Ubuntu: install python3-venv); $again" make_venv
  fi
  set_up_step "install the project and its pinned packages (several minutes the first time)" \
    "see the message above; check the network and the free disk space, and run this again; if it fails again, $again" \
    install_project
  set_up_step "import what was installed" "$again" check_imports
  set_up_step "note that the set-up is complete" "make $VENV writable and run this again" write_stamp
}

# Quick when nothing changed. Two first calls at once take turns where flock exists (Linux).
ensure_environment() {
  exec 9<"$PROJECT_ROOT/pyproject.toml"
  if command -v flock >/dev/null 2>&1 && ! flock -n 9; then
    say "set-up: waiting for another set-up of this folder to end"
    flock 9
  fi
  is_set_up || set_up
  exec 9<&-
}
