"""What a user sees of a run: a live progress bar, a table of completions, a metrics file, and curves drawn from it.

    trainer = Trainer(...)             # of transformers
    monitor.attach(trainer)            # progress and metrics.jsonl, in place of its own progress bar

GRPOTrainer does so by itself; ``grpo-fast plot RUN`` draws what was written.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rich.console import Console

from grpo_fast.trainer.callbacks.records import METRICS_FILE, RunError, drop_after, read_run
from grpo_fast.trainer.callbacks.samples import completions_table, print_completions

if TYPE_CHECKING:
    from grpo_fast.trainer.callbacks.journal import JournalCallback
    from grpo_fast.trainer.callbacks.progress import CompletionsCallback, ProgressBarCallback

__all__ = [
    "METRICS_FILE",
    "CompletionsCallback",
    "JournalCallback",
    "ProgressBarCallback",
    "RunError",
    "attach",
    "completions_table",
    "drop_after",
    "print_completions",
    "read_run",
    "stop",
]

_CALLBACKS = {
    "CompletionsCallback": "grpo_fast.trainer.callbacks.progress",
    "JournalCallback": "grpo_fast.trainer.callbacks.journal",
    "ProgressBarCallback": "grpo_fast.trainer.callbacks.progress",
}


def attach(trainer: Any) -> None:
    """Give a transformers Trainer these callbacks, and take away its own progress bar and printer. Twice is once.

    ``disable_tqdm`` switches our progress off as it does transformers'; the metrics file is written in any case.
    """
    from transformers import PrinterCallback, ProgressCallback

    from grpo_fast.trainer.callbacks.journal import JournalCallback
    from grpo_fast.trainer.callbacks.progress import CompletionsCallback, ProgressBarCallback

    for callback in (ProgressCallback, PrinterCallback, ProgressBarCallback, CompletionsCallback, JournalCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        console = Console(stderr=True)
        trainer.add_callback(ProgressBarCallback(console))
        trainer.add_callback(CompletionsCallback(console))
    trainer.add_callback(JournalCallback())


def stop(trainer: Any) -> None:
    """End the live progress bar of a trainer whose training ended in an error or an interrupt."""
    from grpo_fast.trainer.callbacks.progress import ProgressBarCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressBarCallback):
            callback.stop()


def __getattr__(name: str) -> Any:
    """The callbacks need transformers, which takes seconds to import: only when asked for, so that plotting stays quick."""
    if name in _CALLBACKS:
        return getattr(importlib.import_module(_CALLBACKS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
