#!/usr/bin/env bash
# Creates or updates .venv for `make demo` (bootstrap.sh demo), `make docs` (bootstrap.sh docs) or all other targets (bootstrap.sh test):
# installs the packages and this checkout, and compiles the extension; for `make docs` only the packages that build the site, without
# torch. Uses the interpreter $PYTHON (default python3), and its torch if that is 2.11 or newer; otherwise
# installs the pinned torch. A later call does nothing unless something has changed: it installs packages again after a change of
# pyproject.toml, setup.py or this file, and compiles again after a change of csrc/, setup.py, the build flags or the package versions.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-test}
torch_pin=torch==${GRPO_FAST_TORCH:-2.13.0}  # the variable: for tests with other versions, where the host has no torch
transformers_pin=${GRPO_FAST_TRANSFORMERS:+transformers==$GRPO_FAST_TRANSFORMERS}  # instead of the version of the test group
peers="verl==0.9.1 openrlhf==0.11.2 ms-swift==4.6.0 deepspeed==0.19.8"
needed_by_deepspeed="hjson==3.1.0 py-cpuinfo==9.0.0 msgpack==1.2.4 einops==0.8.2"
triton_pin=triton==3.7.1  # for a CPU build of torch, which does not require triton; a CUDA build requires its own version

fail() { echo "grpo_fast: $*" >&2; exit 1; }
say() { echo "grpo_fast: $*"; }
digest() { sha256sum | cut -c1-16; }

host=${PYTHON:-python3}
python=.venv/bin/python
unset VIRTUAL_ENV PYTHONHOME PYTHONPATH  # the caller's environment must not affect .venv
export PIP_DISABLE_PIP_VERSION_CHECK=1

make_venv() {
  command -v "$host" >/dev/null || fail "'$host' was not found. Install Python 3.10 or newer, or name one: make $what PYTHON=/path/to/python3"
  "$host" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' ||
    fail "$("$host" --version) at '$host'; expected Python 3.10 to 3.13. Name another: make $what PYTHON=/path/to/python3"
  say "creating .venv with $("$host" --version)"
  rm -rf .venv
  "$host" -m venv .venv || { rm -rf .venv; fail "'$host -m venv' failed. On Debian and Ubuntu: apt install python3-venv"; }

  # A .pth file and not --system-site-packages, which does not include the packages of an interpreter that is itself in a venv.
  local found
  found=$("$host" - <<'PY' || true
import importlib.metadata, importlib.util, os
spec = importlib.util.find_spec("torch")
version = importlib.metadata.version("torch").split(".") if spec else ["0", "0"]
if (int(version[0]), int(version[1])) >= (2, 11):
    print(os.path.dirname(os.path.dirname(spec.origin)))
PY
  )
  if [ -n "$found" ]; then
    say "using the torch in $found"
    echo "$found" >"$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/host_torch.pth"
  fi
}

install_packages() {
  local pip="$python -m pip install -qq --no-compile" extras=demo group=""
  [ "$what" = demo ] || { extras=demo,bench; group="--group test"; }
  $pip -U "pip>=25.1" "setuptools>=77" ninja
  if ! $python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    say "installing $torch_pin (large)"
    # uv knows where builds of torch without CUDA are: UV_TORCH_BACKEND=cpu saves gigabytes.
    if [ -n "${UV_TORCH_BACKEND:-}" ]; then uv pip install -q --python $python "$torch_pin"; else $pip "$torch_pin"; fi
  fi
  # The constraints apply the pinned versions of the test group to the demo too, and keep pip from replacing the installed torch.
  { sed -n 's/^ *"\([A-Za-z0-9_-]*==[0-9.]*\)".*/\1/p' pyproject.toml
    $python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))'
    $python -c 'import importlib.metadata as m, sys; sys.exit(any(r.startswith("triton") for r in m.requires("torch") or []))' && echo "$triton_pin"
  } >.venv/constraints.txt || true
  say "installing grpo_fast[$extras]${group:+ and the test group}"
  # The extension is compiled below, in place, where ninja recompiles only the files that have changed.
  GRPO_FAST_BUILD=none $pip -c .venv/constraints.txt --no-build-isolation -e ".[$extras]" $group
  [ -z "$transformers_pin" ] || $pip "$transformers_pin"
  [ "$what" = demo ] || install_peers
}

# Libraries whose dependencies conflict with the pinned ones: tests/peers.py loads single functions from them for comparison. Also the oldest
# TRL that the adapter supports.
install_peers() {
  rm -rf .venv/peers
  local peer
  for peer in $peers $needed_by_deepspeed; do install_into "$peer" .venv/peers; done
  install_into trl==1.15.0 .venv/peers/trl-1.15.0
}

install_into() {  # requirement, folder
  $python -m pip install -qq --no-compile --no-deps --target "$2" "$1" || say "$1 could not be installed: the tests that compare with it are skipped"
}

[ -x $python ] && $python -c '' 2>/dev/null || make_venv

if [ "$what" = docs ]; then
  $python -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$($python --version) in .venv; the tools for the site expect 3.11 or newer. Fix: make clean docs PYTHON=/path/to/python3.11"
  wanted=$(cat pyproject.toml tools/bootstrap.sh | digest)
  if [ "$(cat .venv/ready-docs 2>/dev/null)" != "$wanted" ]; then
    say "installing the tools for the documentation"
    $python -m pip install -qq --no-compile -U "pip>=25.1"
    $python -m pip install -qq --no-compile --group docs
    echo "$wanted" >.venv/ready-docs
  fi
  exit
fi

packages=$({ echo "$torch_pin $transformers_pin"; cat pyproject.toml setup.py tools/bootstrap.sh; } | digest)
ready() { [ "$(cat ".venv/ready-$1" 2>/dev/null)" = "$packages" ]; }
if ! ready test && ! { [ "$what" = demo ] && ready demo; }; then
  install_packages
  echo "$packages" >".venv/ready-$([ "$what" = demo ] && echo demo || echo test)"
fi

compiled=$({ echo "${GRPO_FAST_BUILD:-auto} ${CXX:-}"; cat setup.py grpo_fast/ops/build.py .venv/constraints.txt; find csrc -type f | LC_ALL=C sort | xargs cat; } | digest)
if [ "$(cat .venv/compiled 2>/dev/null)" != "$compiled" ]; then
  if [ "${GRPO_FAST_BUILD:-auto}" = none ]; then
    rm -f grpo_fast/_C*.so
  else
    say "compiling csrc"
    log=.venv/compilation.log
    $python setup.py -q build_ext --inplace >$log 2>&1 || { cat $log >&2; fail "the extension did not compile; see above, or run with GRPO_FAST_BUILD=none"; }
    grep '^grpo_fast:' $log || true
  fi
  echo "$compiled" >.venv/compiled
fi
