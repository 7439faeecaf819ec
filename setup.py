"""The package map and the one extension. No network, no git, no look at the GPU: torch, nvcc and GRPO_FAST_BUILD decide what is built."""

import contextlib
import importlib.util
import os
import runpy
import site
import sys
import sysconfig
import types
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# The folder kernels/ has no __init__.py on purpose: `kernels` is Hugging Face's import name, and a package of that name here would be
# found in its place by everything that runs in a checkout.
PACKAGE_DIR = {"grpo_fast": "grpo_fast", "grpo_fast.kernels": "kernels/fused"}

# The C++ sources travel in the wheel, so that an install without torch or a compiler at hand can compile at first use.
SOURCE_DIR = {"grpo_fast._csrc": "csrc", "grpo_fast._csrc.cpu": "csrc/cpu", "grpo_fast._csrc.cuda": "csrc/cuda"}


def load_build_settings():
    """grpo_fast/ops/build.py, by its path: grpo_fast itself cannot be imported here, it needs torch."""
    return types.SimpleNamespace(**runpy.run_path(str(ROOT / "grpo_fast" / "ops" / "build.py")))


def import_torch():
    """The torch that the extension will run on, or None.

    pip hides the target environment from an isolated build, but leaves sys.prefix on it: its site-packages go to the end of the path, so
    that the build's own tools stay in front. Naming torch as a build requirement instead would fetch gigabytes, and of another version.
    """
    if importlib.util.find_spec("torch") is None:
        for folder in dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib")):
            site.addsitedir(folder)
    with contextlib.suppress(ImportError):
        import torch

        return torch
    return None


def extension(build):
    """The keyword arguments of setup() that build grpo_fast._C, and in words why there are none."""
    mode = build.mode()
    if mode == "none":
        return {}, "GRPO_FAST_BUILD=none"
    if sys.platform == "win32":
        return {}, "the extension is not supported on Windows"
    torch = import_torch()
    if torch is None:
        if mode == "cuda":
            raise RuntimeError("GRPO_FAST_BUILD=cuda, but there is no torch to build for. Install torch first: pip install 'torch>=2.11'.")
        return {}, "there is no torch to build for; it will be compiled at first use"
    if build.cxx_compiler() is None:
        return {}, "no C++ compiler was found; with one (for example: apt install g++) it will be compiled at first use"

    from torch.utils import cpp_extension

    cuda_home, reason = build.choose_cuda(mode, torch.version.cuda)
    print(f"grpo_fast: building for torch {torch.__version__}, {'C++ and CUDA' if cuda_home else 'C++ alone'} ({reason})", file=sys.stderr)
    cpp_extension.CUDA_HOME = cuda_home  # a CPU build of torch ignores the variable; a wheel with CUDA kernels can be made on it too

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self):
            with build.build_environment(native_archs=False):
                super().build_extensions()

    module = cpp_extension.CppExtension(
        "grpo_fast._C",
        [str(Path(path).relative_to(ROOT)) for path in build.sources(ROOT / "csrc", cuda=cuda_home is not None)],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": build.cxx_flags(cuda=cuda_home is not None), "nvcc": build.NVCC_FLAGS},
        extra_link_args=build.link_flags(cuda_home),
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }, ""


def packages(package_dir):
    found = []
    for import_name, folder in package_dir.items():
        found += [import_name] + [f"{import_name}.{sub}" for sub in find_packages(folder)]
    return found


build_settings = load_build_settings()
extension_arguments, why_not = extension(build_settings)
if why_not:
    print(f"grpo_fast: the C++ extension is not built now: {why_not}", file=sys.stderr)

# A wheel that was asked to be pure carries no sources either, or it would compile at first use after all.
source_dir = {} if build_settings.mode() == "none" else SOURCE_DIR

# A release holds a wheel with CUDA kernels beside the one without: their names differ by a local version, "cu130" (tools/ci/wheels.py).
options = extension_arguments.setdefault("options", {})
if os.environ.get("GRPO_FAST_LOCAL_VERSION"):
    options["egg_info"] = {"tag_build": f"+{os.environ['GRPO_FAST_LOCAL_VERSION']}"}

setup(
    packages=packages(PACKAGE_DIR) + list(source_dir),
    package_dir={**PACKAGE_DIR, **source_dir},
    package_data={
        "grpo_fast": ["py.typed"],
        "grpo_fast.integrations": ["digests/*.json"],
        **{name: ["*.cpp", "*.h", "*.cu", "*.cuh"] for name in source_dir},
    },
    include_package_data=False,
    **extension_arguments,
)
