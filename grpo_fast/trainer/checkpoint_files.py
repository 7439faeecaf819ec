"""The files of a checkpoint: those that a resumed run needs, and whether they are still the bytes that were written.

A checkpoint holds ``checksums.json``, the size and the xxh3 checksum (https://xxhash.com, 128 bits) of each of its files. It protects
against empty, truncated and damaged files, not against somebody who writes a new checksum too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from transformers.trainer_callback import TrainerState

from grpo_fast.utils.files import write_json

__all__ = [
    "CHECKSUMS",
    "STATE",
    "CheckpointError",
    "Checksum",
    "changed_files",
    "checkpoints_in",
    "checksums_of",
    "files_of",
    "missing_from",
    "read_object",
    "write_checksums",
]

STATE = "grpo_state.json"  # the state of a GRPO run besides the model, the optimizer and transformers' own state
CHECKSUMS = "checksums.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
SHARDED_WEIGHTS = ("pytorch_model_fsdp*", "global_step*")  # of FSDP and of DeepSpeed, which saves the optimizer with them
NEEDED = {  # what it is -> patterns of which one must match
    "the optimizer's state (optimizer.pt)": ("optimizer.pt", "optimizer.bin", "optimizer_*", "rank*-optimizer.pt", "global_step*"),
    "the learning rate's state (scheduler.pt)": ("scheduler.pt", "global_step*"),
    "the random numbers' state (rng_state.pth)": ("rng_state*.pth",),
}
NOT_READ = (CHECKSUMS, "training_args.bin")  # without a checksum
NEW_RUN = "To start a new run from its weights instead: model = the checkpoint's folder, another output_dir and no resume_from_checkpoint."
BLOCK = 1 << 22  # bytes that are read at once
FIRST_VERSION_WITH_CHECKSUMS = 2  # of the format of STATE


class CheckpointError(ValueError):
    """A checkpoint cannot be resumed from, or a run cannot write its own here."""


class Checksum(NamedTuple):
    """Size and checksum of a file."""

    size: int  # bytes
    xxh3: str  # hexadecimal


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Return the folders ``checkpoint-<step>`` of a run, the newest first."""
    found = [
        (int(match[1]), path) for path in Path(output_dir).glob("checkpoint-*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def missing_from(checkpoint: str | Path) -> str | None:
    """Return a description of the files that a checkpoint lacks for resuming; None if it is complete.

    Names, sizes and the JSON files are checked; `changed_files` reads the others.
    """
    checkpoint = Path(checkpoint)
    try:
        _check_trainer_state(read_object(checkpoint / "trainer_state.json"))
        version = read_object(checkpoint / STATE).get("version")
        checksums = _read_checksums(checkpoint)
    except CheckpointError as error:
        return str(error)
    if not any((checkpoint / name).is_file() for name in WEIGHTS) and not _holds(checkpoint, SHARDED_WEIGHTS):
        return " or ".join(WEIGHTS)
    for what, patterns in NEEDED.items():
        if not _holds(checkpoint, patterns):
            return f"{what}, as with save_only_model=True"
    if checksums is None and isinstance(version, int) and version >= FIRST_VERSION_WITH_CHECKSUMS:
        return CHECKSUMS
    for name, expected in (checksums or {}).items():
        path = checkpoint / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            return name
        if size != expected.size:
            return f"a part of {name}: it has {size} bytes, and {expected.size} were written"
    empty = next((path for path in files_of(checkpoint) if not path.stat().st_size), None)
    return None if empty is None else f"the contents of {empty.relative_to(checkpoint).as_posix()}, which is empty"


def _holds(checkpoint: Path, patterns: Iterable[str]) -> bool:
    return any(path.exists() for pattern in patterns for path in checkpoint.glob(pattern))


def _check_trainer_state(state: dict[str, Any]) -> None:
    try:
        TrainerState(**state)
    except TypeError as error:
        raise CheckpointError(f"a valid trainer_state.json ({error})") from error
    counts = {name: state.get(name, 0) for name in ("global_step", "max_steps", "num_input_tokens_seen")}
    wrong = [f"{name} is {value!r}" for name, value in counts.items() if type(value) is not int or value < 0]
    for name, kind in (("log_history", list), ("stateful_callbacks", dict)):
        if not isinstance(state.get(name) or kind(), kind):
            wrong.append(f"{name} is a {type(state[name]).__name__}")
    if wrong:
        raise CheckpointError(f"a valid trainer_state.json ({', '.join(wrong)})")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: its text, after "lacks", says what is wrong.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"a valid {path.name} (a {type(value).__name__} in place of an object)")
    return value


# Checksums ---------------------------------------------------------------------------------------------------------------------


def files_of(checkpoint: Path) -> list[Path]:
    """Return the files of a checkpoint that have a checksum, sorted; those of subfolders too."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name not in NOT_READ)


def checksums_of(checkpoint: Path, files: Iterable[Path]) -> dict[str, Checksum]:
    """Compute the checksums of some files of a checkpoint, by their paths relative to it. Each is read once, block by block."""
    return {path.relative_to(checkpoint).as_posix(): Checksum(path.stat().st_size, _xxh3(path)) for path in files}


def write_checksums(checkpoint: Path, checksums: Mapping[str, Checksum]) -> None:
    """Write ``checksums.json``."""
    write_json(checkpoint / CHECKSUMS, {name: list(value) for name, value in sorted(checksums.items())})


def changed_files(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Return the files whose contents are not those that were written; none if the checkpoint is of a version without checksums.

    Args:
        checkpoint: a checkpoint from which `missing_from` misses nothing.
        part, parts: check every ``parts``-th file only, so that each process reads its share.
    """
    expected = sorted((_read_checksums(checkpoint) or {}).items())
    return [name for name, checksum in expected[part::parts] if _xxh3(checkpoint / name) != checksum.xxh3]


def _xxh3(path: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return str(digest.hexdigest())


def _read_checksums(checkpoint: Path) -> dict[str, Checksum] | None:
    path = checkpoint / CHECKSUMS
    if not path.exists():
        return None
    found = {}
    for name, value in read_object(path).items():
        if not _is_checksum(value) or not _is_inside(name):
            raise CheckpointError(f"a valid {CHECKSUMS} ({name!r}: {value!r})")
        found[name] = Checksum(*value)
    return found


def _is_checksum(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and type(value[0]) is int and isinstance(value[1], str)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
