#!/usr/bin/env bash
# Builds the C++ extension with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the checkout, and runs the tests of the row,
# loss, product and advantage operators on it; pytest arguments choose others. A report ends the run with an error. Needs g++ with its
# sanitizer libraries.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${GRPO_FAST_VENV:-$PWD/.venv}/bin/python
copy=$(mktemp -d); trap 'rm -rf "$copy"' EXIT

git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$copy"
cd "$copy"
ln -s ../kernels/fused grpo_fast/kernels  # what the install maps for the checkout itself
for library in libasan.so libubsan.so; do
  path=$(${CXX:-c++} -print-file-name=$library)
  [ -e "$path" ] || { echo "grpo_fast: $library was not found. Fix: install g++ with its sanitizer libraries." >&2; exit 1; }
  preload=${preload:+$preload:}$path
done
echo "grpo_fast: compiling csrc with -fsanitize=address,undefined"
PATH=$(dirname "$python"):$PATH GRPO_FAST_BUILD=cpu GRPO_FAST_SANITIZE=1 "$python" setup.py -q build_ext --inplace >build.log 2>&1 ||
  { cat build.log >&2; exit 1; }

# Leaks are not looked for: the interpreter and torch keep memory until the end. Torch itself is not instrumented.
export LD_PRELOAD=$preload PYTHONPATH=$copy PYTHONMALLOC=malloc
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
[ $# -gt 0 ] || set -- tests/test_operator_checks.py tests/test_extreme_cases.py tests/test_rows.py tests/test_product.py tests/test_group_advantages.py
"$python" -m pytest -q -n 0 -p no:cacheprovider -m "not slow and not sweep" -k "not cuda and not compile and not triton" "$@"
