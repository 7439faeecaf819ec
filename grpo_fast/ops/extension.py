"""Loading of the C++ and CUDA extension: the prebuilt one at import, else one compiled at first use into a cache folder.

The extension is a library of operators and not of Python functions: loading it attaches kernels to the schemas of this folder. A missing or
broken extension is a status with a reason and a fix, never an error at import.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

import torch

from grpo_fast.ops import build

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALL = "Run `pip install --no-build-isolation --force-reinstall --no-deps .` in the checkout of grpo_fast and read what it prints."


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether the extension is loaded, and if not, why."""

    loaded: bool
    path: str = ""  # of the loaded library
    why: str = ""  # why it is not loaded
    fix: str = ""


_status: ExtensionStatus | None = None  # None until loading succeeded or failed; a failure is not retried in this process
_prebuilt_failure = ""
_lock = threading.Lock()


def load_prebuilt() -> bool:
    """Load ``grpo_fast._C`` if the installation has one. Takes milliseconds, compiles nothing and never raises.

    Returns:
        True if the extension is loaded.
    """
    global _status, _prebuilt_failure
    if _status is not None:
        return _status.loaded
    # Only in this package: sys.path may contain an editable installation with another extension.
    spec = PathFinder.find_spec("grpo_fast._C", [str(_PACKAGE)])
    if spec is None or spec.origin is None:
        _prebuilt_failure = "this installation of grpo_fast has no compiled extension"
        return False
    try:
        torch.ops.load_library(spec.origin)
    except (OSError, RuntimeError, ImportError) as error:  # another torch than it was built for, or a damaged file
        _prebuilt_failure = f"{spec.origin} does not load: {_first_line(error)}"
        return False
    _status = ExtensionStatus(loaded=True, path=spec.origin)
    return True


def load() -> bool:
    """Load the extension, and compile it first if the installation has none. Idempotent; never raises.

    The compilation happens once per version, PyTorch and machine, under a lock, and is reported on stderr. It is skipped with
    GRPO_FAST_BUILD=none. A failure is remembered for the life of the process: see ``status()``.

    Returns:
        True if the extension's operators can be called.
    """
    global _status
    if _status is not None:
        return _status.loaded
    with _lock:
        if _status is None and not load_prebuilt():
            try:
                _status = _load_compiled()
            except Exception as error:  # the reference backend works without the extension
                _status = _failed(f"the compilation at first use failed: {_first_line(error)}", _INSTALL)
    return _status is not None and _status.loaded


def status() -> ExtensionStatus:
    """Return the state of the extension without loading or compiling it."""
    if _status is not None:
        return _status
    return ExtensionStatus(loaded=False, why=f"{_prebuilt_failure or 'not loaded yet'}; it will be compiled when it is first needed")


def _load_compiled() -> ExtensionStatus:
    mode = build.mode()
    if mode == "none":
        return _failed("GRPO_FAST_BUILD=none forbids the compilation at first use", "Unset GRPO_FAST_BUILD, or install with it unset.")
    if sys.platform == "win32":
        return _failed("the extension is not supported on Windows", "Use Linux (WSL), or the reference backend.")
    csrc = _source_folder()
    if csrc is None:
        fix = f"Install again without GRPO_FAST_BUILD=none. {_INSTALL}"
        return _failed("this install is pure Python (built with GRPO_FAST_BUILD=none): it contains no C++ sources", fix)

    cuda_home = None
    if torch.version.cuda:
        cuda_home, _ = build.choose_cuda(mode, torch.version.cuda)
    library = _cache_folder(csrc, cuda_home) / "_C.so"
    if not library.is_file():
        if build.cxx_compiler() is None:
            fix = "Install a C++17 compiler (for example: `apt install g++`), or set CXX to one."
            return _failed("no C++ compiler was found, and it is compiled at first use", fix)
        library.parent.mkdir(parents=True, exist_ok=True)
        with _locked(library.parent / "lock"):
            if not library.is_file():  # another process may have compiled it while this one waited for the lock
                return _compile(csrc, cuda_home, library)
    torch.ops.load_library(str(library))
    return ExtensionStatus(loaded=True, path=str(library))


def _compile(csrc: Path, cuda_home: str | None, library: Path) -> ExtensionStatus:
    """Compile, load, and rename the finished file to ``library``, so that a killed process leaves no partial file. Needs the lock."""
    from torch.utils import cpp_extension

    _log(f"compiling the {'C++ and CUDA' if cuda_home else 'C++'} extension for torch {torch.__version__}, once, into {library.parent} ...")
    begin = time.perf_counter()
    work = library.parent / "build"
    shutil.rmtree(work, ignore_errors=True)  # left by a killed process, with PyTorch's lock file, which would block the build
    work.mkdir()
    log = library.with_suffix(".log")
    torchs_cuda_home = cpp_extension.CUDA_HOME
    try:
        cpp_extension.CUDA_HOME = cuda_home or torchs_cuda_home  # PyTorch might choose another toolkit
        with build.build_environment(native_archs=cuda_home is not None and torch.cuda.is_available()):
            cpp_extension.load(
                name="_C",
                sources=build.sources(csrc, cuda=cuda_home is not None),
                extra_include_paths=[str(csrc)],
                extra_cflags=build.cxx_flags(cuda=cuda_home is not None),
                extra_cuda_cflags=build.NVCC_FLAGS,
                extra_ldflags=build.link_flags(cuda_home),
                build_directory=str(work),
                with_cuda=cuda_home is not None,
                is_python_module=False,
            )
        os.replace(work / "_C.so", library)
    except Exception as error:
        log.write_text(str(error))
        _log(f"the compilation failed after {time.perf_counter() - begin:.0f} s, the compiler's output is in {log}")
        return _failed(f"the compilation at first use failed: {_first_line(error)}", f"Read {log}; a C++17 compiler and ninja are needed.")
    finally:
        cpp_extension.CUDA_HOME = torchs_cuda_home
        shutil.rmtree(work, ignore_errors=True)
    log.unlink(missing_ok=True)
    _log(f"compiled in {time.perf_counter() - begin:.0f} s")
    return ExtensionStatus(loaded=True, path=str(library))


def _source_folder() -> Path | None:
    """Return the folder of the C++ sources, in the wheel or in the checkout; None if there are none."""
    for folder in (_PACKAGE / "_csrc", _PACKAGE.parent / "csrc"):
        if (folder / "ops.cpp").is_file():
            return folder
    return None


def _cache_folder(csrc: Path, cuda_home: str | None) -> Path:
    """Return a folder under $TORCH_EXTENSIONS_DIR or the user's cache, named by a hash of all that the compiled file depends on."""
    key = hashlib.sha256()
    files = sorted(path for path in csrc.rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))
    for path in [*files, Path(build.__file__)]:
        key.update(path.name.encode() + path.read_bytes())
    key.update(f"{torch.__version__} {torch.version.cuda} {cuda_home} {os.uname().machine} {os.environ.get('CXX')}".encode())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "grpo_fast" / key.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes. Unlike PyTorch's lock file, the operating system releases it when its holder dies."""
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _log("another process is compiling the extension; waiting for it ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _failed(why: str, fix: str) -> ExtensionStatus:
    both = f"{_prebuilt_failure}, and {why}" if _prebuilt_failure else why
    return ExtensionStatus(loaded=False, why=both, fix=fix)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    first_error = next((line for line in lines if "error" in line.lower() and "Error building" not in line), lines[0])
    return f"{type(error).__name__}: {first_error.strip()}"


def _log(text: str) -> None:
    sys.stderr.write(f"grpo_fast: {text}\n")
    sys.stderr.flush()
