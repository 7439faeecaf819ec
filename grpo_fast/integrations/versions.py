"""The versions of other libraries that this package was compared with, and what happens with another one.

- a newer one in which everything that this package replaces or relies on is unchanged (probe.py): it runs, with one warning;
- a newer one in which something changed, or an older one: an ImportError that names what changed, because options may have another meaning,
  which nothing would report;
- one that ``GRPO_FAST_ACCEPT_VERSIONS`` names, as ``trl==1.17.0,verl==0.10.0``: it runs, with a warning that names what changed.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os

from packaging.version import InvalidVersion, Version

from grpo_fast.utils.warn import warn

__all__ = ["ACCEPT_VERSIONS", "COMPARED", "refuse_other_versions"]

ACCEPT_VERSIONS = "GRPO_FAST_ACCEPT_VERSIONS"  # the environment variable

COMPARED = {  # by the name of the distribution; ascending
    "trl": ("1.15.0", "1.16.0"),  # 1.14 has no fused LM head to replace
    "liger-kernel": ("0.8.1", "0.8.2", "0.8.3", "0.8.4", "0.8.5"),  # 0.8.0 corrects the KL of a sequence-level ratio by each token's ratio
    "verl": ("0.9.1",),  # 0.9.0 averages GSPO over sequences for every loss_agg_mode
    "openrlhf": ("0.11.2",),
    "ms-swift": ("4.6.0",),
}


@functools.cache
def refuse_other_versions(distribution: str, caller: str, fix: str, *, required: bool = False) -> None:
    """Check that the installed version of a library is one of COMPARED, or a newer one without a change that matters here.

    Args:
        caller: what needs the library, for the message.
        fix: what to do with another version, for the message.
        required: whether the library must be installed.

    Raises:
        ImportError: names the installed version, those that were compared, what changed, and the fix.
        ValueError: GRPO_FAST_ACCEPT_VERSIONS cannot be read.
    """
    compared = COMPARED[distribution]
    expected = ", ".join(compared)
    try:
        installed = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        if required:
            raise ImportError(f"{caller}: {distribution} is not installed; expected one of {expected}.") from error
        return
    if Version(installed) in map(Version, compared):
        return
    changes = _changes(distribution, installed)
    if not changes:
        warn(f"{caller}: {distribution} {installed} is newer than the last that was compared, {compared[-1]}; what is used is unchanged.")
        return
    changed = "; ".join(changes)
    if _accepted(distribution, installed):
        warn(f"{caller}: {distribution} is {installed}, accepted by {ACCEPT_VERSIONS}. Results may be wrong. Not as compared: {changed}.")
        return
    raise ImportError(
        f"{caller}: {distribution} is {installed}; expected one of those it was compared with: {expected}. Not as compared: {changed}. "
        f"{fix} To run it all the same, after reading what changed: {ACCEPT_VERSIONS}={distribution}=={installed}."
    )


def _changes(distribution: str, installed: str) -> list[str]:
    """What differs from the compared versions, in words; empty for a newer version without a change that matters here."""
    newest = COMPARED[distribution][-1]
    if Version(installed) < Version(newest):  # looked at, and left out for a reason
        return [f"it is older than {newest} and not one of them"]
    from grpo_fast.integrations.probe import changed_parts  # only a version that is not known costs its import

    return changed_parts(distribution)


def _accepted(distribution: str, installed: str) -> bool:
    """Whether the environment variable names this version of this library."""
    for entry in filter(None, (part.strip() for part in os.environ.get(ACCEPT_VERSIONS, "").split(","))):
        name, separator, version = (part.strip() for part in entry.partition("=="))
        try:
            if name == distribution and Version(version) == Version(installed):
                return True
            Version(version)
        except InvalidVersion:
            separator = ""
        if not separator or name not in COMPARED:
            raise ValueError(
                f"{ACCEPT_VERSIONS} holds {entry!r}; expected LIBRARY==VERSION, separated by commas, with a library among "
                f"{', '.join(COMPARED)}. Fix: for example {ACCEPT_VERSIONS}={distribution}=={installed}."
            )
    return False
