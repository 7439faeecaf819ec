#!/usr/bin/env bash
# All tests but the long ones, in the environment that tools/bootstrap.sh made; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not sweep" "$@"
