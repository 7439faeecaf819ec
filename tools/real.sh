#!/usr/bin/env bash
# `make real`: trains SmolLM2-135M-Instruct to name capitals over three seeds, and evaluates it before and after at five temperatures. Each
# finished evaluation or training is kept in runs/real/real.raw.json, from which the next call continues. Exits with status 1 if the
# held-out accuracy did not rise by more than twice its standard error. Arguments are passed on, as in --seeds 5 --output other.json.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${REAL_PYTHON:-.venv/bin/python}
$python tools/real_parts.py model
model=${GRPO_FAST_REAL_PARTS:-${XDG_CACHE_HOME:-$HOME/.cache}/grpo_fast/real-parts}/smollm2-135m-instruct
exec $python -m grpo_fast study training examples/capitals/settings.yaml --model "$model" --correct names_capital --use_cpu \
  --temperatures 1.0 --eval_temperatures 0 0.3 0.6 1.0 1.3 --eval_rounds 1 --seeds 3 --require_gain --output runs/real/real.json "$@"
