"""The PTX of the CUDA sources, by nvcc."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from pathlib import Path

from grpo_fast.ops import build

from .parser import Entry, parse

ROOT = Path(__file__).resolve().parents[2]
WHY_NOT = "" if build.nvcc() else "no nvcc: install a CUDA toolkit, or set CUDA_HOME to one"


@functools.cache
def ptx_of(source: str) -> str:
    """The PTX of a file under csrc/cuda for sm_90; kept under build/ptx until sources or compiler change."""
    compiler, path = build.nvcc(), ROOT / "csrc" / "cuda" / source
    assert compiler is not None, WHY_NOT
    sources = [path, *sorted((ROOT / "csrc").rglob("*.h"))]
    key = hashlib.sha256(os.path.realpath(compiler).encode() + b"".join(each.read_bytes() for each in sources)).hexdigest()[:16]
    kept = ROOT / "build" / "ptx" / f"{path.stem}.{key}.ptx"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}")  # several test processes may compile at once
        command = [compiler, *build.NVCC_FLAGS, "-arch=sm_90", "-ptx", f"-I{ROOT / 'csrc'}", str(path), "-o", str(new)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        new.replace(kept)
    return kept.read_text()


@functools.cache
def entry_of(source: str, *parts: str) -> Entry:
    """The kernel of a file whose mangled name has these parts."""
    (entry,) = parse(ptx_of(source), *parts).values()
    return entry
