# Sourced by the other scripts: makes .venv, or reuses it, with this project and the given extras installed for CPU.

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

# ensure_environment [EXTRAS]
ensure_environment() {
  local extras=${1:-} stamp python
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python) || fail "needs Python 3.11 or newer; set PYTHON=/path/to/python3."
    "$python" -m venv .venv || {
      rm -rf .venv
      fail "could not make .venv; the Python module venv is missing (Debian: python3-venv)."
    }
  fi
  stamp=$(cat pyproject.toml <(echo "$extras") | cksum | tr ' ' -)
  if [ ! -e ".venv/installed-$stamp" ]; then
    echo "Installing into .venv ..."
    # Python compiles what is imported; compiling all that is installed would take as long as installing it.
    .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --editable ".${extras:+[$extras]}" 2>.venv/pip.log ||
      fail "could not install the packages of pyproject.toml (no network?): $(grep -m1 ERROR .venv/pip.log)"
    touch ".venv/installed-$stamp"
  fi
}
