"""GRPOTrainer and its settings, on transformers' Trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from grpo_fast.utils.install_hints import install

if TYPE_CHECKING:
    from grpo_fast.trainer.config import GRPOConfig
    from grpo_fast.trainer.grpo_trainer import GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer"]

_OF_THE_EXTRA = {"accelerate", "datasets", "httpx", "transformers"}
_MODULES = {"GRPOConfig": "grpo_fast.trainer.config", "GRPOTrainer": "grpo_fast.trainer.grpo_trainer"}


def __getattr__(name: str) -> Any:
    """Import the classes on first access: they need transformers, which takes seconds to import, and modules beside them do not."""
    if name in _MODULES:
        try:
            return getattr(importlib.import_module(_MODULES[name]), name)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] not in _OF_THE_EXTRA:
                raise
            raise ImportError(f"grpo_fast.trainer.{name} needs {error.name}, which is not installed. Fix: {install('train')}") from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
