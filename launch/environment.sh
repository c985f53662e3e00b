# shellcheck shell=bash
# Sourced by the other scripts: makes .venv with what was tested together, or uses it as it stands.
# EXTRAS names extras of setup.py, none if it is empty; PYTHON is the interpreter to make it with.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
extras=${EXTRAS-test}
stamp=".venv/$(cat setup.py launch/constraints.txt <(echo "$extras") | sha256sum | cut -c 1-16)"
if [ ! -e "$stamp" ]; then
  python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed: PYTHON=python3.12 bash $0" >&2
    exit 2
  fi
  [ -d .venv ] || "$python" -m venv .venv
  echo "installing cfg_jax${extras:+[$extras]} into .venv ..."
  .venv/bin/pip install --quiet --disable-pip-version-check \
    --constraint launch/constraints.txt --editable ".${extras:+[$extras]}"
  touch "$stamp"
fi
# shellcheck disable=SC1091
. .venv/bin/activate
