"""The reference policy of the KL penalty: none, the model without its adapter, or a frozen copy that may follow the policy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grpo_fast.models.unwrap import is_peft, is_sharded
from grpo_fast.trainer.config import GRPOConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ReferencePolicy"]

FILE = "reference.safetensors"


class ReferencePolicy:
    """The policy whose log-probabilities the KL penalty and some rewards use.

    A PEFT model without its adapter is its own reference. Any other model is copied, if a reference is needed.

    Args:
        model: the model before training, not wrapped.
        args: the settings ``beta``, ``sync_ref_model``, ``ref_model_sync_steps`` and ``ref_model_mixup_alpha``.
        for_rewards: a reward reads ``ref_logprobs``, which needs a reference policy even if ``beta`` is 0.

    Raises:
        ValueError: the settings cannot be used with this model.
    """

    def __init__(self, model: PreTrainedModel | nn.Module, args: GRPOConfig, *, for_rewards: bool = False) -> None:
        self.args, self.for_rewards = args, for_rewards
        self.copy: nn.Module | None = None
        if args.sync_ref_model and is_peft(model):
            raise ValueError("sync_ref_model is True with a PEFT model, whose reference is the model without adapter; expected False.")
        if (args.beta != 0 or for_rewards) and not is_peft(model):
            if any(hasattr(p, "ds_id") for p in model.parameters()):
                raise ValueError(
                    "beta is not 0, or a reward reads ref_logprobs, with DeepSpeed's third stage; expected LoRA, whose reference needs no "
                    "copy, or neither."
                )
            self.copy = copy.deepcopy(model).eval().requires_grad_(False).to(args.device)
            _broadcast_from_first_process(self.copy)

    @contextmanager
    def of(self, model: nn.Module, unwrapped: Any) -> Iterator[nn.Module]:
        """Yield the model to call as the reference policy.

        Args:
            model: the policy as it is called, wrapped or not.
            unwrapped: the policy without wrappers, whose adapter is disabled if it is a PEFT model.
        """
        if self.copy is not None:
            yield self.copy
        else:
            with unwrapped.disable_adapter():
                yield model

    @torch.no_grad()
    def follow(self, model: nn.Module, unwrapped: nn.Module, step: int) -> None:
        """Every ``ref_model_sync_steps`` steps, set the reference to alpha policy + (1 - alpha) reference.

        Raises:
            ValueError: the model is sharded, which is known only once training has begun.
        """
        if not self.args.sync_ref_model or self.copy is None:
            return
        if is_sharded(model):
            raise ValueError("sync_ref_model is True with a sharded model; expected False, or DDP.")
        if step == 0 or step % self.args.ref_model_sync_steps:
            return
        for reference, policy in zip(self.copy.parameters(), unwrapped.parameters(), strict=True):
            reference.lerp_(policy.to(reference.dtype), self.args.ref_model_mixup_alpha)

    def save(self, folder: Path) -> None:
        """Write the reference to a checkpoint if it follows the policy; a fixed reference is made again when the run resumes."""
        from safetensors.torch import save_model

        if self.args.sync_ref_model and self.copy is not None:
            save_model(self.copy, str(folder / FILE))

    def load(self, folder: Path) -> None:
        """Read the file that `save` wrote, if there is one."""
        from safetensors.torch import load_model

        if self.args.sync_ref_model and self.copy is not None and (folder / FILE).exists():
            load_model(self.copy, str(folder / FILE), device=str(self.args.device))


@torch.no_grad()
def _broadcast_from_first_process(model: nn.Module) -> None:
    """Broadcast the weights of the first process: by default FSDP loads them in one process only, until the policy is sharded."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            torch.distributed.broadcast(tensor, src=0)
