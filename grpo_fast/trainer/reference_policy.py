"""The reference policy of the KL penalty: none, the model without its adapter, or a frozen copy that may follow the policy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from grpo_fast.models.unwrap import is_peft, is_sharded
from grpo_fast.trainer.adapter_reference import StartingAdapter, changes_nothing
from grpo_fast.trainer.checkpoint_files import CheckpointError
from grpo_fast.trainer.config import GRPOConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ReferencePolicy"]

FILE = "reference.safetensors"
NO_REFERENCE, NO_ADAPTER, STARTING_ADAPTER, COPY = "none", "without adapter", "starting adapter", "copy"


class ReferencePolicy:
    """The policy whose log-probabilities the KL penalty and some rewards use: the policy that training starts from.

    A PEFT model with a new adapter is its own reference without the adapter. With an adapter that was trained before, the values that its
    trainable parameters have now are kept. Any other model is copied. Nothing is done if no reference is needed.

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
        self.start: StartingAdapter | None = None
        if args.beta == 0 and not for_rewards:
            return
        if is_peft(model):
            # One answer for all processes: by default FSDP loads the weights in one process only.
            answer = [not args.sync_ref_model and changes_nothing(model)]
            broadcast_object_list(answer)
            if not answer[0]:
                self._check_not_partitioned(model, "a new LoRA adapter without sync_ref_model, whose reference needs no copy")
                self.start = StartingAdapter(model, args.device)
                _broadcast_from_first_process(self.start.values.values())
            return
        self._check_not_partitioned(model, "a new LoRA adapter, whose reference needs no copy")
        self.copy = copy.deepcopy(model).eval().requires_grad_(False).to(args.device)
        _broadcast_from_first_process((*self.copy.parameters(), *self.copy.buffers()))

    @property
    def kind(self) -> str:
        """Which reference policy there is; a checkpoint records it."""
        if self.copy is not None:
            return COPY
        if self.start is not None:
            return STARTING_ADAPTER
        return NO_ADAPTER if self.args.beta != 0 or self.for_rewards else NO_REFERENCE

    @contextmanager
    def of(self, model: nn.Module, unwrapped: Any) -> Iterator[nn.Module]:
        """Yield the model to call as the reference policy.

        Args:
            model: the policy as it is called, wrapped or not.
            unwrapped: the policy without wrappers; if it is a PEFT model, its adapter is disabled or has the values of the start inside
                the context.
        """
        if self.copy is not None:
            yield self.copy
        elif self.start is not None:
            with self.start.in_place(model, unwrapped):
                yield model
        else:
            with unwrapped.disable_adapter():
                yield model

    @torch.no_grad()
    def follow(self, model: nn.Module, unwrapped: nn.Module, step: int) -> None:
        """Every ``ref_model_sync_steps`` steps, set the reference to alpha policy + (1 - alpha) reference.

        With a PEFT model this is done with each parameter of the adapter, so for LoRA with its factors and not with their product.

        Raises:
            ValueError: the model is sharded, which is known only once training has begun.
        """
        if not self.args.sync_ref_model:
            return
        if is_sharded(model) and self.start is None:
            raise ValueError("sync_ref_model is True with a sharded model; expected False, or DDP.")
        if step == 0 or step % self.args.ref_model_sync_steps:
            return
        alpha = self.args.ref_model_mixup_alpha
        if self.start is not None:
            self.start.follow(model, unwrapped, alpha)
        elif self.copy is not None:
            for reference, policy in zip(self.copy.parameters(), unwrapped.parameters(), strict=True):
                reference.lerp_(policy.to(reference.dtype), alpha)

    def save(self, folder: Path) -> None:
        """Write the reference to a checkpoint, except a fixed copy of the whole model, which is made again when the run resumes."""
        from safetensors.torch import save_file, save_model

        if self.start is not None:
            save_file({name: value.contiguous().cpu() for name, value in self.start.values.items()}, str(folder / FILE))
        elif self.args.sync_ref_model and self.copy is not None:
            save_model(self.copy, str(folder / FILE))

    def load(self, folder: Path, kind: str = "") -> None:
        """Continue with the reference of a checkpoint.

        Args:
            folder: of the checkpoint.
            kind: the `kind` of reference of the run that wrote it; empty if it is not known.

        Raises:
            CheckpointError: the file with the reference is missing, or does not fit the model.
        """
        if kind == NO_ADAPTER and self.start is not None and not self.args.sync_ref_model:
            self.start = None  # the model was given with the adapter of the checkpoint, with which the run did not start
        if self.start is None and (self.copy is None or not self.args.sync_ref_model):
            if kind == STARTING_ADAPTER and self.kind == NO_ADAPTER:
                raise CheckpointError(
                    f"{folder} is of a run that started from a trained adapter, its reference, and the model has a new one; expected that "
                    "adapter. Fix: give the trainer the model that the run was started with."
                )
            return
        if not (folder / FILE).exists():
            if kind in (STARTING_ADAPTER, COPY) and self.args.sync_ref_model:
                raise CheckpointError(f"{folder} lacks {FILE}, the reference policy; expected it with sync_ref_model.")
            return
        self._load_file(folder / FILE)

    def _load_file(self, path: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file, load_model

        try:
            if self.start is not None:
                self.start.load(load_file(path, device=str(self.args.device)))
            elif self.copy is not None:
                load_model(self.copy, str(path), device=str(self.args.device))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}). Fix: another checkpoint.") from error

    def _check_not_partitioned(self, model: nn.Module, expected: str) -> None:
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            raise ValueError(
                f"beta is not 0, or a reward reads ref_logprobs, with DeepSpeed's third stage; expected {expected}, or neither."
            )


@torch.no_grad()
def _broadcast_from_first_process(tensors: Any) -> None:
    """Broadcast the weights of the first process: by default FSDP loads them in one process only, until the policy is sharded."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)
