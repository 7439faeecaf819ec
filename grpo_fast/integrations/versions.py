"""The versions of other libraries that this package was compared with. Another one that is installed is refused: its options may mean
something else, and nothing would say so."""

from __future__ import annotations

import functools
import importlib.metadata

from packaging.version import Version

__all__ = ["COMPARED", "refuse_other_versions"]

COMPARED = {  # by the name of the distribution
    "trl": ("1.15.0", "1.16.0"),  # 1.14 has no fused LM head to stand in for
    "liger-kernel": ("0.8.1", "0.8.2", "0.8.3", "0.8.4", "0.8.5"),  # 0.8.0 corrects the KL of a sequence's ratio by each token's
    "verl": ("0.9.1",),  # 0.9.0 averages GSPO over sequences whatever loss_agg_mode says
    "openrlhf": ("0.11.2",),
    "ms-swift": ("4.6.0",),
}


@functools.cache
def refuse_other_versions(distribution: str, asked_by: str, cure: str, *, needed: bool = False) -> None:
    """Nothing, if the installed version is one that was compared with, or none is installed and none needed.

    Raises:
        ImportError: names the version installed, those that were compared with, and the cure.
    """
    expected = ", ".join(COMPARED[distribution])
    try:
        installed = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        if needed:
            raise ImportError(f"{asked_by}: {distribution} is not installed; expected one of {expected}.") from error
        return
    if Version(installed) not in {Version(version) for version in COMPARED[distribution]}:
        raise ImportError(f"{asked_by}: {distribution} is {installed}; expected one of those it was compared with: {expected}. {cure}")
