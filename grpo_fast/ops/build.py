"""How the C++ and CUDA extension is compiled, for setup.py (ahead of time) and for extension.py (at first use).

setup.py loads this file by its path before anything is installed: at module level it may import only the standard library.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MODES = ("auto", "cpu", "cuda", "none")

# LibTorch's stable ABI as of PyTorch 2.11: an extension compiled against a newer PyTorch loads on every PyTorch from 2.11 on.
TARGET_TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# No -ffast-math: it would break masks of -inf and the rounding that the kernels rely on. -fopenmp-simd enables `#pragma omp simd`, with
# which the compiler vectorises a reduction without -ffast-math; no OpenMP runtime is linked.
CXX_FLAGS = [
    "-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fvisibility-inlines-hidden",
    "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", TARGET_TORCH,
]  # fmt: skip
NVCC_FLAGS = ["-O3", "-std=c++17"]
CUDA_ARCHS = "8.0;9.0;10.0+PTX"  # when TORCH_CUDA_ARCH_LIST is unset


def mode() -> str:
    """Return the value of the environment variable GRPO_FAST_BUILD.

    Returns:
        "auto" (C++, and CUDA where torch has it and nvcc is found), "cpu", "cuda" or "none".

    Raises:
        ValueError: another value.
    """
    value = os.environ.get("GRPO_FAST_BUILD", "auto").strip().lower() or "auto"
    if value not in MODES:
        raise ValueError(f"GRPO_FAST_BUILD is {value!r}; expected one of {', '.join(MODES)}. Unset it for auto.")
    return value


def sources(csrc: Path, *, cuda: bool) -> list[str]:
    """Return the files to compile under ``csrc``: *.cpp and cpu/*.cpp, with ``cuda`` also cuda/*.cpp and cuda/*.cu; with unique stems."""
    patterns = ["*.cpp", "cpu/*.cpp", *(["cuda/*.cpp", "cuda/*.cu"] if cuda else [])]
    return [str(path) for pattern in patterns for path in sorted(csrc.glob(pattern))]


def cxx_flags(*, cuda: bool) -> list[str]:
    """Return the flags of the C++ files. ``USE_CUDA`` is torch's macro: it enables the stream functions of the stable ABI."""
    return [*CXX_FLAGS, *(["-DUSE_CUDA"] if cuda else []), *_sanitizer_flags()]


def link_flags(cuda_home: str | None) -> list[str]:
    """Return the linker flags, to be placed after torch's library folders."""
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    # Keep libtorch as a needed library although no symbol refers to it: the weak CUDA symbols are resolved through it.
    flags = ["-Wl,--no-as-needed", "-lc10", "-ltorch", "-ltorch_cpu", *_sanitizer_flags()]
    if cuda_home:  # the static runtime: the file then loads with any CUDA runtime of PyTorch, or with none
        flags += [f"-L{cuda_home}/lib64", f"-L{cuda_home}/lib", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return flags


def _sanitizer_flags() -> list[str]:
    """For `make sanitize` (tools/sanitize.sh): what reads out of bounds or is undefined ends the process with a report."""
    if os.environ.get("GRPO_FAST_SANITIZE", "0") in ("", "0"):
        return []
    return ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]  # -O3: minutes a file


def cxx_compiler() -> str | None:
    """Return the C++ compiler that PyTorch will call, or None."""
    return shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0])


def nvcc() -> str | None:
    """Return the CUDA compiler of the toolkit found, else the one on PATH, else None."""
    home = find_cuda_home()
    return str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")


def find_cuda_home() -> str | None:
    """Return the first CUDA toolkit with nvcc and the static runtime: $CUDA_HOME, $CUDA_PATH, that of nvcc on PATH, /usr/local/cuda*."""
    found = shutil.which("nvcc")
    on_path = str(Path(found).resolve().parents[1]) if found else None
    usual = ["/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True)]
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), on_path, *usual):
        if home and Path(home, "bin", "nvcc").is_file() and list(Path(home).glob("lib*/libcudart_static.a")):
            return home
    return None


def choose_cuda(build_mode: str, torch_cuda: str | None) -> tuple[str | None, str]:
    """Decide whether the CUDA sources are compiled.

    Args:
        build_mode: a value of ``mode()``.
        torch_cuda: ``torch.version.cuda``, None for a CPU build of torch.

    Returns:
        (folder of the CUDA toolkit, or None for C++ only; the reason in words).

    Raises:
        RuntimeError: ``build_mode`` is "cuda" and no toolkit was found.
    """
    if build_mode in ("cpu", "none"):
        return None, f"GRPO_FAST_BUILD={build_mode}"
    if build_mode == "auto" and not torch_cuda:
        return None, "torch is built without CUDA"
    home = find_cuda_home()
    if home is None:
        if build_mode == "auto":
            return None, "no CUDA toolkit (nvcc and libcudart_static.a) was found"
        raise RuntimeError(
            "GRPO_FAST_BUILD=cuda, but no CUDA toolkit (bin/nvcc and libcudart_static.a) was found in CUDA_HOME, beside nvcc on PATH or in "
            "/usr/local/cuda. Install one or set CUDA_HOME to it; or build the C++ half alone with GRPO_FAST_BUILD=cpu."
        )
    if build_mode == "auto" and torch_cuda:
        found = _nvcc_version(home)
        if found and found.split(".")[0] != torch_cuda.split(".")[0]:
            fix = "set CUDA_HOME to a toolkit of the same major version"
            return None, f"nvcc in {home} is CUDA {found}, torch is built for CUDA {torch_cuda}; {fix}"
    return home, f"CUDA toolkit {home}"


def _nvcc_version(home: str) -> str | None:
    text = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else None


@contextlib.contextmanager
def build_environment(*, native_archs: bool) -> Iterator[None]:
    """Set what torch.utils.cpp_extension reads from the environment for the time of a build.

    - PATH includes ninja: pip installs it beside python, which is not on PATH unless the environment was activated;
    - TORCH_CUDA_ARCH_LIST: ``CUDA_ARCHS`` unless set, or unless ``native_archs`` lets PyTorch query the visible GPUs.
    """
    before = dict(os.environ)
    folders = [os.path.dirname(sys.executable)]
    with contextlib.suppress(ImportError):
        import ninja

        folders.append(ninja.BIN_DIR)
    os.environ["PATH"] = os.pathsep.join([before.get("PATH", os.defpath), *folders])
    if not native_archs:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    try:
        yield
    finally:
        os.environ["PATH"] = before.get("PATH", os.defpath)
        if "TORCH_CUDA_ARCH_LIST" not in before:
            os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
