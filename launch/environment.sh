# shellcheck shell=bash
# Sourced by the other scripts: makes .venv with what was tested together, or uses it as it stands.
# EXTRAS names extras of setup.py; PYTHON the interpreter to make it with, 3.11 or newer.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
extras=${EXTRAS:-test}
stamp=".venv/$(cat setup.py launch/constraints.txt <(echo "$extras") | sha256sum | cut -c 1-16)"
if [ ! -e "$stamp" ]; then
  [ -d .venv ] || "${PYTHON:-python3}" -m venv .venv
  echo "installing cfg_jax[$extras] into .venv ..."
  .venv/bin/pip install --quiet --disable-pip-version-check \
    --constraint launch/constraints.txt --editable ".[$extras]"
  touch "$stamp"
fi
# shellcheck disable=SC1091
. .venv/bin/activate
