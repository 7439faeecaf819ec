"""A model as continuous batching needs it under mixed precision: its forward passes run in another thread, over a cache of their dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_fast.generation.protocol import SamplerError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.continuous_batching import ContinuousBatchingManager

__all__ = ["run_as_here"]


def run_as_here(manager: ContinuousBatchingManager, model: PreTrainedModel) -> None:
    """Let a manager, which has not started, run its model under the autocast that is in force in the calling thread.

    autocast belongs to a thread, and the manager's thread has none. The manager allocates its cache and its mask in the model's dtype,
    while under autocast keys may be float32 (after the rotary embedding) and values 16 bits; so both are cast when they enter the cache.

    Raises:
        SamplerError: this version of transformers keeps the model elsewhere.
    """
    if getattr(manager, "model", None) is not model:
        raise SamplerError(
            "continuous batching: transformers' manager does not keep its model as `model`, so that it cannot run under autocast. "
            "Fix: transformers 5.17 to 5.24, or sampler 'transformers'."
        )
    manager.model = _PagedModel(model)  # it has what the manager reads


class _PagedModel:
    """The model in the place of which it stands, with the dtype of its computation and under the autocast of the thread that made this."""

    def __init__(self, model: PreTrainedModel) -> None:
        kind = model.device.type
        self._model, self._device_type = model, kind
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.dtype: torch.dtype = model.dtype if self._autocast is None else self._autocast

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, cache: Any, **kwargs: Any) -> Any:
        _cast_updates(cache)
        with torch.autocast(self._device_type, dtype=self._autocast, enabled=self._autocast is not None):
            return self._model(*args, cache=cache, **kwargs)


def _cast_updates(cache: Any) -> None:
    """Let ``cache.update(key_states, value_states, ...)`` cast both to the cache's dtype."""
    if "update" in vars(cache):
        return
    update, dtype = cache.update, cache.dtype

    def cast_and_update(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)
        return found

    cache.update = cast_and_update
