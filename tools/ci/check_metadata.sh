#!/usr/bin/env bash
# The metadata and the contents of the artifacts in a folder; twine and check-wheel-contents must be on PATH (pip install --group release).
set -euo pipefail
shopt -s nullglob
twine check --strict "$1"/*.whl "$1"/*.tar.gz
for wheel in "$1"/*.whl; do
  check-wheel-contents --toplevel grpo_fast "$wheel"
done
