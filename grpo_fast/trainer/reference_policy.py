"""The policy that the KL penalty holds on to: none, the model without its adapter, or a frozen copy that may follow at a distance."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from grpo_fast.models.unwrap import is_peft, is_sharded
from grpo_fast.trainer.config import GRPOConfig

__all__ = ["ReferencePolicy"]

FILE = "reference.safetensors"


class ReferencePolicy:
    """As ``args`` want it, of the model that training starts from.

    for_rewards: a reward reads its log-probabilities, so that there is one whatever ``beta`` is.

    Raises:
        ValueError: settings that this model cannot be trained with.
    """

    def __init__(self, model: Any, args: GRPOConfig, *, for_rewards: bool = False) -> None:
        self.args, self.for_rewards = args, for_rewards
        self.copy: Any = None
        if args.sync_ref_model and is_peft(model):
            raise ValueError("sync_ref_model is True with a PEFT model, whose reference is the model without adapter; expected False.")
        if (args.beta != 0 or for_rewards) and not is_peft(model):
            if any(hasattr(p, "ds_id") for p in model.parameters()):
                raise ValueError(
                    "beta is not 0, or a reward reads ref_logprobs, with DeepSpeed's third stage; expected LoRA, whose reference needs no "
                    "copy, or neither."
                )
            self.copy = copy.deepcopy(model).eval().requires_grad_(False).to(args.device)
            self._take_from_first_process()

    @torch.no_grad()
    def _take_from_first_process(self) -> None:
        """FSDP's default is to load the weights in one process, and to leave zeros in the others until the policy is divided among them."""
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            for tensor in (*self.copy.parameters(), *self.copy.buffers()):
                torch.distributed.broadcast(tensor, src=0)

    @contextmanager
    def of(self, model: Any, unwrapped: Any) -> Iterator[Any]:
        """What to call in place of the policy ``model``, inside the ``with``."""
        if self.copy is not None:
            yield self.copy
        else:
            with unwrapped.disable_adapter():
                yield model

    @torch.no_grad()
    def follow(self, model: Any, unwrapped: Any, step: int) -> None:
        """Every ``ref_model_sync_steps``: reference = alpha policy + (1 - alpha) reference."""
        if not self.args.sync_ref_model:
            return
        if is_sharded(model):  # known since training began, and said at its first step
            raise ValueError("sync_ref_model is True with a sharded model; expected False, or DDP.")
        if step == 0 or step % self.args.ref_model_sync_steps:
            return
        for mine, theirs in zip(self.copy.parameters(), unwrapped.parameters(), strict=True):
            mine.lerp_(theirs.to(mine.dtype), self.args.ref_model_mixup_alpha)

    def save(self, folder: Path) -> None:
        """If it has moved; else it is what the run starts from."""
        from safetensors.torch import save_model

        if self.args.sync_ref_model:
            save_model(self.copy, str(folder / FILE))

    def load(self, folder: Path) -> None:
        """What `save` wrote, if it did."""
        from safetensors.torch import load_model

        if self.args.sync_ref_model and (folder / FILE).exists():
            load_model(self.copy, str(folder / FILE), device=str(self.args.device))
