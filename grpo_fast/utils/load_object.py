"""Objects by name, for settings files and command lines: ``package.module:name``, ``package.module.name`` or ``path/to/file.py:name``."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["load_object", "name_of_object"]


def load_object(name: str, *, by: str, others: str = "") -> Any:
    """Import the module or the file, and return what it calls by this name. A file's folder is added to ``sys.path``.

    Args:
        name: as in ``"package.module:function"``, ``"package.module.function"`` or ``"path/to/file.py:function"``.
        by: who asks, the beginning of messages.
        others: names that are also allowed, for the message about one that is none of these three.

    Raises:
        ValueError: there is no such module, file or name, or it cannot be imported.

    Example:
        >>> load_object("math:sqrt", by="example")(4.0)
        2.0
    """
    place, colon, attribute = name.rpartition(":")
    if not colon:
        place, _, attribute = name.rpartition(".")
    if not place or not attribute:
        known = f"is none of {others}; expected one of these, " if others else "is no name of an object; expected "
        raise ValueError(f"{by}: {name!r} {known}'package.module:function' or 'file.py:function'.")
    found: Any = _from_file(Path(place), by) if place.endswith(".py") else _from_module(place, name, by)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{by}: {place!r} has no {attribute!r}, which {name!r} asks for.")
        found = getattr(found, part)
    return found


def name_of_object(x: object) -> str:
    """Return the name of a function or class by which `load_object` finds it, or a description if it has none.

    Example:
        >>> from math import sqrt
        >>> name_of_object(sqrt)
        'math:sqrt'
    """
    name = getattr(x, "__qualname__", None)
    return repr(x) if name is None else f"{getattr(x, '__module__', None) or 'builtins'}:{name}"


def _from_module(place: str, name: str, by: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            fix = f"Fix: install it, add its folder to PYTHONPATH, or name the file: 'path/{place.rpartition('.')[2]}.py:...'."
            raise ValueError(f"{by}: there is no module {place!r} for {name!r}. {fix}") from error
        raise  # the module exists; a module that it imports does not


def _from_file(path: Path, by: str) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ValueError(f"{by}: there is no file {path}.")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as `python path/to/file.py` does; worker processes can then import it by name
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(path.stem)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = "" if isinstance(error, SyntaxError) else f" ({where.filename}, line {where.lineno})"  # its message has the line
        raise ValueError(f"{by}: {path} cannot be imported: {type(error).__name__}: {error}{line}.") from error
    if Path(module.__file__ or "").resolve() != path:
        raise ValueError(f"{by}: the name of {path} is taken by the module {module.__file__}. Fix: rename the file.")
    return module
