#!/usr/bin/env bash
# Installs a CUDA compiler where a wheel with CUDA kernels is built (GRPO_FAST_BUILD=cuda), from packages for Python: no driver, no GPU, nothing
# outside of the package index. cibuildwheel runs it once per container.
set -euo pipefail
[ "${GRPO_FAST_BUILD:-}" = cuda ] || exit 0
[ ! -x /usr/local/cuda/bin/nvcc ] || exit 0
python=${1:-/opt/python/cp312-cp312/bin/python}
folder=${2:-/opt/cuda-toolkit}
$python -m pip install -q --target "$folder" "cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.*"
home=$(dirname "$(dirname "$(find "$folder" -path '*/bin/nvcc' | head -1)")")
"$home/bin/nvcc" --version
if [ $# = 0 ]; then ln -sfn "$home" /usr/local/cuda; fi
