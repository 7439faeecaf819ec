"""GRPOTrainer and its settings, on transformers' Trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_fast.trainer.config import GRPOConfig
    from grpo_fast.trainer.grpo_trainer import GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer"]

_MODULES = {"GRPOConfig": "grpo_fast.trainer.config", "GRPOTrainer": "grpo_fast.trainer.grpo_trainer"}


def __getattr__(name: str) -> Any:
    """Import the classes on first access: they need transformers, which takes seconds to import, and modules beside them do not."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
