"""Single modules and methods of libraries whose whole cannot be installed beside ours, for comparison with their own arithmetic.

verl, OpenRLHF and ms-swift pin old versions of what we test with, or import Ray, vLLM and DeepSpeed; what is compared with needs none of
them. So the wheels lie aside (`pip install --no-deps --target .venv/peers verl==0.9.1 openrlhf==0.11.2 ms-swift==4.6.0`), only the module
that is wanted is loaded, and imports it does not need are stand-ins; of a module that is not to be had alone, some methods.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(sys.prefix) / "peers"


def installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


OTHER_VERSIONS = bool(os.environ.get("GRPO_FAST_ACCEPT_VERSIONS"))  # set by the nightly run, which tries the newest versions
needs_trl = pytest.mark.skipif(
    installed("trl") != "1.16.0" and not OTHER_VERSIONS, reason=f"compared with trl 1.16.0, installed is {installed('trl')}"
)


class _StandIn(types.ModuleType):
    """A module whose every attribute is a class that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def peer_module(
    package: str, version: str, module: str, stand_ins: tuple[str, ...] = (), distribution: str | None = None
) -> types.ModuleType:
    """Load ``package.module`` from the peers folder without running the package's own ``__init__``; skip, and say why, where it is not.

    Args:
        package: the import name.
        version: the one whose arithmetic the test knows.
        module: below the package.
        stand_ins: modules that are imported on the way and not used.
        distribution: the name it is installed by; None = the package's.
    """
    _skip_without(distribution or package, version)
    with _only_what_is_needed(package, module, stand_ins):
        return importlib.import_module(f"{package}.{module}")


def peer_methods(distribution: str, version: str, file: str, methods: tuple[str, ...], **names: Any) -> dict[str, Callable[..., Any]]:
    """Methods of a class, as functions that take self, without importing its module; skip, and say why, where it is not.

    Args:
        file: in the peers folder.
        methods: "Class.method".
        names: what they find in their module.
    """
    _skip_without(distribution, version)
    classes = [node for node in ast.parse((PEERS / file).read_text()).body if isinstance(node, ast.ClassDef)]
    found = {f"{of.name}.{node.name}": node for of in classes for node in of.body if isinstance(node, ast.FunctionDef)}
    module = ast.Module([found[method] for method in methods], type_ignores=[])
    exec(compile(module, str(PEERS / file), "exec", annotations.compiler_flag), names)
    return {method.partition(".")[2]: names[method.partition(".")[2]] for method in methods}


def _skip_without(distribution: str, version: str) -> None:
    found = next(PEERS.glob(f"{distribution.replace('-', '_')}-*.dist-info"), None)
    if found is None:
        pytest.skip(f"{distribution} is not in {PEERS}: pip install --no-deps --target {PEERS} {distribution}=={version}")
    there = importlib.metadata.Distribution.at(found).version
    if there != version:
        pytest.skip(f"compared with {distribution} {version}, {PEERS} holds {there}")


@contextmanager
def _only_what_is_needed(package: str, module: str, stand_ins: tuple[str, ...]) -> Iterator[None]:
    def concerned(name: str) -> bool:
        return name in stand_ins or name == package or name.startswith(f"{package}.")

    before = {name: found for name, found in sys.modules.items() if concerned(name)}
    for name in before:
        del sys.modules[name]
    parts = [package, *module.split(".")[:-1]]
    for depth in range(1, len(parts) + 1):  # packages without their __init__
        bare = _StandIn(".".join(parts[:depth]))
        bare.__path__ = [str(PEERS.joinpath(*parts[:depth]))]
        sys.modules[bare.__name__] = bare
    for name in stand_ins:
        sys.modules[name] = _StandIn(name)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if concerned(name)]:
            del sys.modules[name]
        sys.modules.update(before)
