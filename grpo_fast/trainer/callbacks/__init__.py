"""What a user sees of a run: a progress bar, a table of completions and a metrics file. Each is an ordinary transformers callback.

``add_default_callbacks(trainer)`` gives them to a transformers ``Trainer``; `GRPOTrainer` calls it in its constructor.
``grpo-fast plot RUN`` draws the metrics file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rich.console import Console

from grpo_fast.trainer.callbacks.completions_table import completions_table, print_completions
from grpo_fast.trainer.metrics_file import METRICS_FILE, RunError, drop_later_steps, read_run

if TYPE_CHECKING:
    from transformers import Trainer

    from grpo_fast.trainer.callbacks.completions import CompletionsCallback
    from grpo_fast.trainer.callbacks.jsonl_log import JSONLLogCallback
    from grpo_fast.trainer.callbacks.progress import ProgressBarCallback

__all__ = [
    "METRICS_FILE",
    "CompletionsCallback",
    "JSONLLogCallback",
    "ProgressBarCallback",
    "RunError",
    "add_default_callbacks",
    "completions_table",
    "drop_later_steps",
    "print_completions",
    "read_run",
    "stop_progress",
]

_CALLBACKS = {
    "CompletionsCallback": "grpo_fast.trainer.callbacks.completions",
    "JSONLLogCallback": "grpo_fast.trainer.callbacks.jsonl_log",
    "ProgressBarCallback": "grpo_fast.trainer.callbacks.progress",
}


def add_default_callbacks(trainer: Trainer) -> None:
    """Add the progress bar, the completions table and the metrics file to a trainer, and remove transformers' own progress output.

    A second call replaces the callbacks of the first. ``args.disable_tqdm`` leaves the progress bar and the table out; the metrics file is
    always written.
    """
    from transformers import PrinterCallback, ProgressCallback

    from grpo_fast.trainer.callbacks.completions import CompletionsCallback
    from grpo_fast.trainer.callbacks.jsonl_log import JSONLLogCallback
    from grpo_fast.trainer.callbacks.progress import ProgressBarCallback

    for callback in (ProgressCallback, PrinterCallback, ProgressBarCallback, CompletionsCallback, JSONLLogCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        console = Console(stderr=True)
        trainer.add_callback(ProgressBarCallback(console))
        trainer.add_callback(CompletionsCallback(console))
    trainer.add_callback(JSONLLogCallback())


def stop_progress(trainer: Trainer) -> None:
    """Stop the live progress bar after an error or an interrupt, which end training without a call of ``on_train_end``."""
    from grpo_fast.trainer.callbacks.progress import ProgressBarCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressBarCallback):
            callback.stop()


def __getattr__(name: str) -> Any:
    """Import the callback classes on first access, because they need transformers, which plotting and reading a run do not."""
    if name in _CALLBACKS:
        return getattr(importlib.import_module(_CALLBACKS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
