"""TRL's functions as they are installed, with the clipped loss of TRL's GRPOTrainer on top."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_fast.benchmark.contestants import Contestant, Result, UnavailableError, readable_loss, with_gradient
from grpo_fast.benchmark.data import Batch

__all__ = ["make"]


def make(temperature: float, entropy: bool) -> Contestant:
    """selective_log_softmax, or selective_log_softmax_and_entropy with an entropy that is a metric and has no gradient.

    The loss is readable_loss, which is TRL's own formula for loss_type="dapo" of one process: the same operations in the same order.

    Raises:
        UnavailableError: this TRL has no such function, or cannot be imported.
    """
    function = _imported("selective_log_softmax_and_entropy" if entropy else "selective_log_softmax")

    def score(batch: Batch) -> tuple[Tensor, Tensor | None]:
        if entropy:
            logprobs, metric = function(batch.logits, batch.token_ids, entropy_requires_grad=False, temperature=temperature)
            return logprobs, metric
        logprobs = function(batch.logits, batch.token_ids, temperature=temperature)
        return logprobs, None

    def forward(batch: Batch) -> Result:
        with torch.no_grad():
            logprobs, metric = score(batch)
        return Result(logprobs=logprobs, entropy=metric)

    def forward_backward(batch: Batch) -> Result:
        logprobs, _ = score(batch)
        return with_gradient(readable_loss(logprobs, batch.old_logprobs, batch.advantages, batch.mask), batch)

    return Contestant("trl", forward, forward_backward, arithmetic="own")


def _imported(function_name: str) -> Callable[..., Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from trl.trainer import utils
    except Exception as error:  # an import that broke, in whatever way, is a contestant that is not there
        raise UnavailableError(f"trl.trainer.utils cannot be imported ({type(error).__name__}: {error}). Cure: pip install trl") from error
    function = getattr(utils, function_name, None)
    if function is None:
        raise UnavailableError(f"the installed TRL has no {function_name}. Cure: pip install 'trl>=1.16'")
    return function
