"""Tab completion of the options of `grpo-fast train`, which are generated from dataclasses when the command runs."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

from typer.core import TyperCommand

__all__ = ["CompletedCommand", "train_flags"]


class Completion(NamedTuple):
    """A word that the shell may put in: what Typer's own class of this purpose has, which it gives no public name."""

    value: str
    type: str = "plain"
    help: str | None = None


def train_flags(start: str) -> list[str]:
    """The options of `grpo-fast train` that begin with these characters: of the usual ones, or of all if none of those does.

    All options need transformers, whose import takes seconds.
    """
    from grpo_fast.trainer.run_settings_help import USUAL

    def of(names: Any) -> list[str]:
        return sorted(flag for name in names if (flag := f"--{name}").startswith(start))

    usual = of([*(name for names in USUAL.values() for name in names), "help", "help-all"])
    if usual:
        return usual
    from grpo_fast.trainer.config import GRPOConfig
    from grpo_fast.trainer.run_settings import TrainOptions
    from grpo_fast.utils.dataclass_options import read_options

    return of(read_options([TrainOptions, GRPOConfig]))


class CompletedCommand(TyperCommand):
    """A command whose arguments are parsed by another module; those of ``train`` are completed."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """The words that complete ``incomplete``, as Typer asks for them."""
        found: list[Any] = super().shell_complete(ctx, incomplete)
        if self.name == "train" and incomplete.startswith("-"):
            with contextlib.suppress(ImportError):  # the command names what to install
                found += [Completion(flag) for flag in train_flags(incomplete)]
        return found
