#!/usr/bin/env bash
# Builds, tests and measures on a GPU machine, which needs no network: bench/gpu.sh [plan|build|smoke|test|bench|head|profile|tune|all]...
# See bench/README.md. `plan` prints the order. A part that is done is skipped unless AGAIN=1.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-bench/results} wheels=${WHEELS:-wheels} device=${DEVICE:-cuda} site=$PWD/build/gpu
mkdir -p "$out" "$site"
# Import what is built here and not the checkout, which lacks the package that the install maps into it: see setup.py.
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

[ "$*" = plan ] && exec "$python" bench/gpu_parts.py plan
file=$out/gpu.json logs=build/gpu/logs
[ "$device" = cuda ] || file=$out/rehearsal.json
mkdir -p "$logs"
# What was measured before goes on, where this machine measured it: see bench/README.md.
[ -f "$file" ] || cp "bench/results/${file##*/}" "$file" 2>/dev/null

# Seconds of a step. BUDGET_S sets each.
budget() {
  "$python" bench/gpu_parts.py budget "$1"
}

install() {  # until $until
  timeout "$((until > SECONDS ? until - SECONDS : 1))" "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade \
    --target "$site" "$@"
}

# What the build is made of: the same tree is not built twice, and a changed one is never measured by what was built before.
sources() {
  find csrc grpo_fast kernels setup.py pyproject.toml "$wheels" -type f ! -path '*/__pycache__/*' ! -name '*.so' -print0 2>/dev/null |
    sort -z | xargs -0 sha256sum | sha256sum
}

# If the extension does not build, the Triton kernels are still installed, tested and measured.
build() {
  local here code=0 of until=$((SECONDS + $(budget build)))
  of=$(sources)
  rm -f "$site/sources"
  if compgen -G "$wheels/*.whl" >/dev/null; then
    install "$wheels"/*.whl || code=1  # all at once: packages that share a folder would take it from each other
  fi
  here=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))' 2>/dev/null) || here=9.0
  GRPO_FAST_BUILD=${GRPO_FAST_BUILD:-cuda} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$here} install --no-build-isolation . 2>&1 |
    tee "$logs/build.log" && echo "$of" >"$site/sources" && return $code
  until=$((SECONDS + 30))
  GRPO_FAST_BUILD=none install --no-build-isolation . && echo "$of" >"$site/sources"  # only `build` tries that tree again
  return 1
}

# Log the versions of the libraries: a test whose library is missing is skipped, a file that imports a missing one is an error.
preflight() {
  timeout 30 "$python" - <<'END' | tee "$logs/preflight.log"
import importlib, importlib.metadata, platform
names = "torch triton setuptools pytest pytest-timeout pytest-xdist hypothesis numpy transformers trl liger-kernel verl quack-kernels matplotlib"
print(f"python {platform.python_version()}")
for name in names.split():
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "missing")
for module in ("trl.trainer.utils", "liger_kernel.ops.grpo_loss"):
    try:
        importlib.import_module(module)
    except Exception as error:
        print(f"{module} does not import: {type(error).__name__}: {error}")
END
  timeout 10 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | tee -a "$logs/preflight.log"
  timeout 30 "$python" -c 'from grpo_fast.cli.doctor import run; run()' 2>&1 | tee -a "$logs/preflight.log"
}

# Every file that has a test for a GPU; several at once, since most of the time goes into compiling kernels. Without the strictness of
# pyproject.toml, which asks for plugins that need not be there. A kernel that hangs takes its worker with it (by a thread: no signal is
# heard while C code waits for the device), and the others go on.
tests() {
  local seconds files options=() workers=$(($(nproc) / 2))
  workers=${WORKERS:-$((workers > 8 ? 8 : workers > 1 ? workers : 1))}
  seconds=$(budget test)
  mapfile -t files < <(grep -lE 'mark\.gpu\b' tests/test_*.py)
  "$python" -c 'import xdist' 2>/dev/null && options+=(-n "$workers" --dist worksteal)
  "$python" -c 'import pytest_timeout' 2>/dev/null &&
    options+=(--timeout 150 --timeout-method thread --session-timeout "$((seconds > 60 ? seconds - 20 : seconds))")
  timeout "$seconds" "$python" -m pytest -q -m gpu -ra --continue-on-collection-errors -p no:cacheprovider \
    -o addopts=--import-mode=importlib --junitxml="$out/test.xml" "${options[@]}" "${files[@]}" 2>&1 | tee "$logs/test.log"
}

# No case is begun in the last half minute of a long part; what was measured before is in the file.
measure() {
  local seconds program=bench/gpu_bench.py
  seconds=$(budget "$1")
  [ "$1" = tune ] && program=bench/gpu_tune.py
  [ "$1" = profile ] && program=bench/gpu_profile.py
  GRPO_FAST_SOURCES=$(cat "$site/sources") BUDGET_S=$((seconds > 60 ? seconds - 30 : seconds)) timeout -k 10 "$seconds" \
    "$python" "$program" "$1" --device "$device" --output "$file" 2>&1 | tee "$logs/$1.log"
}

# Into one file, which is replaced as a whole: a machine may be lost at any moment.
pack() {
  tar -czf "$out/.logs.partial" -C "$logs" . && mv "$out/.logs.partial" "$out/logs.tar.gz"
}

failed=0
part() {
  local start=$SECONDS code=0
  "$@" || code=$?
  echo "$*: exit $code after $((SECONDS - start)) s" | tee -a "$out/parts.log"
  pack
  if [ "$code" -ne 0 ]; then
    failed=1
    echo "gpu.sh: $* failed; the rest goes on" >&2
  fi
  return "$code"
}

# A step by its name, unless it is done: by this machine, from these sources.
step() {  # name command...
  local name=$1 sources
  shift
  sources=$(cat "$site/sources" 2>/dev/null)
  if [ -z "${AGAIN:-}" ] && [ -n "$sources" ] &&
    "$python" bench/gpu_parts.py is-done "$name" --output "$file" --device "$device" --sources "$sources"; then
    echo "$name: done before (AGAIN=1 runs it again)" | tee -a "$out/parts.log"
    return
  fi
  part "$@" && [ -n "$sources" ] &&
    "$python" bench/gpu_parts.py record "$name" --output "$file" --device "$device" --sources "$sources"
}

[ $# -gt 0 ] || set -- all
[ "$*" = all ] && set -- build smoke test bench head profile
for name in "$@"; do
  case $name in
    build) part build ;;
    smoke | test | bench | head | profile | tune)
      [ "$(cat "$site/sources" 2>/dev/null)" = "$(sources)" ] || part build
      case $name in
        test)
          preflight
          step test tests
          ;;
        smoke)
          step smoke measure smoke
          step smoke_cluster measure smoke_cluster
          ;;
        bench)
          step bench measure bench
          step cluster measure cluster
          ;;
        *) step "$name" measure "$name" ;;
      esac
      ;;
    *)
      echo "usage: bench/gpu.sh [plan|build|smoke|test|bench|head|profile|tune|all]..." >&2
      exit 2
      ;;
  esac
done
pack
exit $failed
