"""The versions of other libraries that this package was compared with. Any other installed version raises an error, because its options may
have another meaning, which nothing would report."""

from __future__ import annotations

import functools
import importlib.metadata

from packaging.version import Version

__all__ = ["COMPARED", "refuse_other_versions"]

COMPARED = {  # by the name of the distribution
    "trl": ("1.15.0", "1.16.0"),  # 1.14 has no fused LM head to replace
    "liger-kernel": ("0.8.1", "0.8.2", "0.8.3", "0.8.4", "0.8.5"),  # 0.8.0 corrects the KL of a sequence-level ratio by each token's ratio
    "verl": ("0.9.1",),  # 0.9.0 averages GSPO over sequences for every loss_agg_mode
    "openrlhf": ("0.11.2",),
    "ms-swift": ("4.6.0",),
}


@functools.cache
def refuse_other_versions(distribution: str, caller: str, fix: str, *, required: bool = False) -> None:
    """Check that the installed version of a library is one of COMPARED.

    Args:
        caller: what needs the library, for the message.
        fix: what to do with another version, for the message.
        required: whether the library must be installed.

    Raises:
        ImportError: names the installed version, those that were compared, and the fix.
    """
    expected = ", ".join(COMPARED[distribution])
    try:
        installed = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        if required:
            raise ImportError(f"{caller}: {distribution} is not installed; expected one of {expected}.") from error
        return
    if Version(installed) not in {Version(version) for version in COMPARED[distribution]}:
        raise ImportError(f"{caller}: {distribution} is {installed}; expected one of those it was compared with: {expected}. {fix}")
