"""The JSON file of a study that goes on: what is finished is in it, and who asks something else keeps off it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grpo_fast.ops.environment import describe
from grpo_fast.utils.errors import SettingsError

__all__ = ["begun", "made_with", "made_with_others"]

MADE_WITH = ("cpu", "torch", "grpo_fast", "commit")  # of `describe`


def begun(path: Path, new: dict[str, Any], study: str, each: Sequence[str]) -> dict[str, Any]:
    """What the file holds of the same study; ``new`` where there is no file, or where a quick look takes the place of another.

    Args:
        path: of the JSON file.
        new: what such a result begins with: ``kind``, ``quick``, ``options``, and an empty list of what is measured, among others.
        study: its name, for messages.
        each: the keys that everything in that list must have.

    Raises:
        SettingsError: the file holds something else, or a study with other options.
    """
    if not path.exists():
        return new
    where, cure = f"output is {str(path)!r}", "Cure: another --output, or remove the file."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{where}, which holds no JSON ({error}); expected a study of {study} to go on with. {cure}") from error
    if not _is_one(found, new, each):
        raise SettingsError(f"{where}, which holds something else; expected a study of {study} to go on with. {cure}")
    found = {"quick": False} | found
    if new["quick"] and found["quick"]:
        return new
    told = json.loads(json.dumps(new["options"])) | {"quick": new["quick"]}
    was, same = found["options"] | {"quick": found["quick"]}, f"expected the same, to go on with it. {cure}"
    for name, value in told.items():
        if name not in was or was[name] != value:
            raise SettingsError(f"{where}, a study with {name} = {was.get(name)!r}, and now {name} is {value!r}; {same}")
    return {name: found[name] for name in new}


def _is_one(found: Any, new: Mapping[str, Any], each: Sequence[str]) -> bool:
    """Whether this is the file of such a study, of whatever options."""
    if not isinstance(found, dict) or found.get("kind") != new["kind"]:
        return False
    if not all(isinstance(found.get(name), type(value)) for name, value in new.items() if name != "quick"):
        return False
    parts = [part for name, value in new.items() if isinstance(value, list) for part in found[name]]
    return all(isinstance(part, dict) and all(name in part for name in each) for part in parts)


def made_with() -> dict[str, Any]:
    """Machine, versions and commit: kept with everything that is measured, since a study may go on elsewhere."""
    machine = describe()
    return {name: machine[name] for name in MADE_WITH} | {"transformers": version("transformers")}


def made_with_others(parts: Sequence[Mapping[str, Any]]) -> str | None:
    """In what of `made_with` the parts of a study differ, as in ``torch (2.12.0, 2.13.0)``; None: in nothing."""
    makers = [part.get("made_with") or {} for part in parts]
    differ = []
    for name in dict.fromkeys(name for maker in makers for name in maker):
        values = list(dict.fromkeys(str(maker.get(name, "unknown")) for maker in makers))
        if len(values) > 1:
            differ.append(f"{name} ({', '.join(values)})")
    return ", ".join(differ) or None
