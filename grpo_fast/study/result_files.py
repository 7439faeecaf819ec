"""The two files of a study: the published result, and the measurements that an interrupted study continues from.

``NAME.json`` is the result: summaries, comparisons and advice. ``NAME.raw.json`` beside it holds every measurement. It is written after
each finished part, stays when the study is done, and is needed only to continue or extend the study.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from grpo_fast.ops.environment import describe
from grpo_fast.utils.errors import SettingsError
from grpo_fast.utils.files import write_text

__all__ = ["JSONObject", "StoredStudy", "differing_versions", "load_study", "raw_path", "versions", "write_measurements", "write_result"]

JSONObject = dict[str, Any]

MACHINE_VERSIONS = ("cpu", "torch", "grpo_fast", "commit")  # keys of `describe`
_LEAF_LIST = re.compile(r"\[\n([-+\d.eE,\snul]*)\]")  # of numbers and null
_LEAF_OBJECT = re.compile(r"\{\n([^{}\[\]]*)\}")


class StoredStudy(NamedTuple):
    """The content of the files of a study."""

    measurements: JSONObject  # with the list of finished parts, which new parts are appended to
    result: JSONObject | None  # the published result, if it answers the whole question and the measurements are not there


def raw_path(path: Path) -> Path:
    """Return the file of the measurements that belongs to a result.

    Example:
        >>> raw_path(Path("runs/sampling.json")).name
        'sampling.raw.json'
    """
    return path.with_suffix(".raw.json")


def write_measurements(path: Path, measurements: Mapping[str, Any]) -> None:
    """Write the measurements beside the result ``path``."""
    _write(raw_path(path), measurements)


def write_result(path: Path, result: Mapping[str, Any], measurements: Mapping[str, Any]) -> None:
    """Write the published result; first the measurements, if they are not stored beside it: ``path`` may hold them, see `load_study`."""
    if not raw_path(path).exists():
        write_measurements(path, measurements)
    _write(path, result)


def load_study(path: Path, new: JSONObject, study: str, *, part_keys: Sequence[str], question: Mapping[str, Any]) -> StoredStudy:
    """Read what is finished of a study, and check that it is the same study.

    A result without its measurements can be printed again, but not extended. A result of an earlier version holds its measurements itself.

    Args:
        path: of the result.
        new: an empty study: ``kind``, ``quick``, ``options`` and an empty list of finished parts, among others. It is returned if there is
            no file, or if a quick study replaces another quick study.
        study: its name, for messages.
        part_keys: keys that every finished part must have.
        question: keys of the result, and the values that they must have for the result to answer the current command.

    Raises:
        SettingsError: a file holds something else, or a study with other options, or a result that does not answer the question.
    """
    fix = "Fix: another --output, or remove the file."
    parts_key = next(name for name, value in new.items() if isinstance(value, list))
    found: dict[Path, JSONObject] = {}
    for file in (raw_path(path), path):
        if file.exists():
            content = _read(file, new, parts_key, study, part_keys, fix)
            if new["quick"] and content["quick"]:
                return StoredStudy(new, None)
            _check_options(file, content, new, fix)
            found[file] = content
    for content in found.values():
        if parts_key in content:
            return StoredStudy({name: content[name] for name in new}, None)
    if not found:
        return StoredStudy(new, None)
    result = found[path]
    for name, value in question.items():
        if result.get(name) != value:
            raise SettingsError(
                f"output is {str(path)!r}, a result with {name} = {result.get(name)!r}, and now {name} is {value!r}; expected the same, "
                f"since {raw_path(path).name}, which is needed to extend the study, is missing. {fix}"
            )
    return StoredStudy(new, result)


def versions() -> JSONObject:
    """Return the machine, package versions and commit, which are recorded with every part: a study may be continued elsewhere."""
    machine = describe()
    return {name: machine[name] for name in MACHINE_VERSIONS} | {"transformers": version("transformers")}


def differing_versions(parts: Sequence[Mapping[str, Any]]) -> str | None:
    """Return in which `versions` the parts of a study differ, as in ``torch (2.12.0, 2.13.0)``, or None."""
    recorded = [part.get("made_with") or {} for part in parts]
    differing = []
    for name in dict.fromkeys(name for one in recorded for name in one):
        values = list(dict.fromkeys(str(one.get(name, "unknown")) for one in recorded))
        if len(values) > 1:
            differing.append(f"{name} ({', '.join(values)})")
    return ", ".join(differing) or None


def _read(file: Path, new: JSONObject, parts_key: str, study: str, part_keys: Sequence[str], fix: str) -> JSONObject:
    where = f"output is {str(file)!r}"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{where}, which holds no JSON ({error}); expected a study of {study} to go on with. {fix}") from error
    if not _is_study(content, new, parts_key, part_keys):
        raise SettingsError(f"{where}, which holds something else; expected a study of {study} to go on with. {fix}")
    return {"quick": False} | content


def _is_study(content: object, new: JSONObject, parts_key: str, part_keys: Sequence[str]) -> bool:
    """Return whether this is the result, or the measurements, of a study of this kind, with any options."""
    if not isinstance(content, dict) or content.get("kind") != new["kind"]:
        return False
    if not all(isinstance(content.get(name), type(value)) for name, value in new.items() if name not in ("quick", parts_key)):
        return False
    if parts_key not in content:
        return isinstance(content.get("advice"), dict)
    parts = content[parts_key]
    return isinstance(parts, list) and all(isinstance(part, dict) and all(key in part for key in part_keys) for part in parts)


def _check_options(file: Path, content: JSONObject, new: JSONObject, fix: str) -> None:
    asked = json.loads(json.dumps(new["options"])) | {"quick": new["quick"]}
    stored = content["options"] | {"quick": content["quick"]}
    for name, value in asked.items():
        if name not in stored or stored[name] != value:
            raise SettingsError(
                f"output is {str(file)!r}, a study with {name} = {stored.get(name)!r}, and now {name} is {value!r}; expected the same, "
                f"to go on with it. {fix}"
            )


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with an indent of 1, each list of numbers and each object without nested ones on one line."""
    text = json.dumps(value, indent=1, allow_nan=False)
    for pattern, (left, right) in ((_LEAF_LIST, "[]"), (_LEAF_OBJECT, "{}")):
        text = pattern.sub(lambda match: left + " ".join(line.strip() for line in match[1].splitlines()).strip() + right, text)  # noqa: B023
    write_text(path, text + "\n")
