#!/usr/bin/env bash
# The fast tests, in an environment of their own: bash launch/test.sh [arguments of pytest]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check .
ruff format --check .
JAX_PLATFORMS=cpu exec python -m pytest -n 2 --dist loadfile -m "not slow" "$@"
