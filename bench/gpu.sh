#!/usr/bin/env bash
# Everything a GPU can say, on a machine without network: bench/gpu.sh build|test|bench|head|all. See bench/README.md.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-bench/results} budget=${BUDGET_S:-420} wheels=${WHEELS:-wheels}
mkdir -p "$out"
export PYTHONPATH="$PWD:/tmp/grpo_fast_site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

build() {
  if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/grpo_fast_site "$wheels"/*.whl
  fi
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} timeout "$budget" "$python" setup.py -q build_ext --inplace 2>&1 | tee "$out/build.log"
}
tests() { timeout "$budget" "$python" -m pytest -q -m gpu tests/test_triton.py tests/test_cluster.py tests/test_group_advantages.py 2>&1 | tee "$out/test.log"; }
measure() { BUDGET_S=$budget timeout $((budget + 120)) "$python" bench/gpu_bench.py "$1" --output "$out/gpu.json" 2>&1 | tee "$out/$1.log"; }

failed=0
part() { "$@" || { echo "gpu.sh: $* failed; the rest goes on" >&2; failed=1; }; }
case ${1:-all} in
  build) part build ;;
  test) part tests ;;
  bench | head) part measure "$1" ;;
  all) part build; part tests; part measure bench; part measure head ;;
  *) echo "usage: bench/gpu.sh build|test|bench|head|all" >&2; exit 2 ;;
esac
exit $failed
