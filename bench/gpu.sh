#!/usr/bin/env bash
# Everything a GPU can say, on a machine without network: bench/gpu.sh build|test|bench|head|all. See bench/README.md.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-bench/results} wheels=${WHEELS:-wheels}
mkdir -p "$out"
export PYTHONPATH="$PWD:/tmp/grpo_fast_site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
gpu_tests=(tests/test_triton.py tests/test_cluster.py tests/test_group_advantages.py)

# Seconds of a part, together 19 minutes. BUDGET_S sets each.
budget() {
  case $1 in
    build | head) echo "${BUDGET_S:-180}" ;;
    test) echo "${BUDGET_S:-360}" ;;
    bench) echo "${BUDGET_S:-420}" ;;
  esac
}

build() {
  if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/grpo_fast_site "$wheels"/*.whl
  fi
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} timeout "$(budget build)" "$python" setup.py -q build_ext --inplace 2>&1 |
    tee "$out/build.log"
}

# Which of the tests' packages are there: a file that imports a missing one is an error of its collection, and the rest runs.
preflight() {
  "$python" - <<'EOF' | tee "$out/preflight.log"
from importlib.util import find_spec
names = ("pytest", "pytest_timeout", "hypothesis", "packaging", "numpy", "triton", "transformers", "trl", "liger_kernel", "matplotlib")
print(*(f"{name}: {'there' if find_spec(name) else 'missing'}" for name in names), sep="\n")
EOF
}

# Without the strictness of pyproject.toml, which asks for plugins that need not be there.
tests() {
  preflight
  timeout "$(budget test)" "$python" -m pytest -q -m gpu -ra --continue-on-collection-errors -p no:cacheprovider \
    -o addopts=--import-mode=importlib --junitxml="$out/test.xml" "${gpu_tests[@]}" 2>&1 | tee "$out/test.log"
}

# No case is begun in the last half minute; what was measured before is in the file.
measure() {
  local seconds
  seconds=$(budget "$1")
  BUDGET_S=$((seconds > 60 ? seconds - 30 : seconds)) timeout "$seconds" "$python" bench/gpu_bench.py "$1" --output "$out/gpu.json" 2>&1 |
    tee "$out/$1.log"
}

failed=0
part() {
  local start=$SECONDS code=0
  "$@" || code=$?
  echo "$*: exit $code after $((SECONDS - start)) s" | tee -a "$out/parts.log"
  if [ "$code" -ne 0 ]; then
    failed=1
    echo "gpu.sh: $* failed; the rest goes on" >&2
  fi
}
case ${1:-all} in
  build) part build ;;
  test) part tests ;;
  bench | head) part measure "$1" ;;
  all)
    part build
    part tests
    part measure bench
    part measure head
    ;;
  *)
    echo "usage: bench/gpu.sh build|test|bench|head|all" >&2
    exit 2
    ;;
esac
exit $failed
