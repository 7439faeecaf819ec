"""Rollouts by transformers' continuous batching: rows leave the batch when they end, so that no step is spent on finished rows."""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from typing import Any

import torch

from grpo_fast.generation.protocol import Completion, SamplerError, SamplingParams, check_prompts, end_tokens
from grpo_fast.models.unwrap import eval_mode, inner_model, is_sharded

__all__ = ["ContinuousBatchingSampler"]

GREEDY = 1e-4  # transformers chooses sampling or maximum for all requests at once; at this temperature the two are the same


class ContinuousBatchingSampler:
    """transformers' paged scheduler over the model that is trained (a preview feature of transformers; 5.17 is what this is tested with).

    Each request carries its own temperature, top-k and top-p. Worth it where lengths differ much; on a GPU it wants flash attention.

    Args:
        model: the causal language model, wrapped (DDP, PEFT, torch.compile) or not. Sharded parameters (FSDP, DeepSpeed 3) are refused.
        block_size: tokens in a block of the key-value cache; None = 256 (what flash attention wants), 64 on a CPU.
        num_blocks: blocks in the cache; None = as many as ``max_memory_percent`` of what is free holds; on a CPU as many as are needed.
        max_memory_percent: share of the free memory for the cache. The default leaves room for the backward pass.
        max_batch_tokens: tokens in one forward pass; None = transformers' choice; on a CPU 256, or one for each prompt if that is more.
        time_limit: seconds without any finished completion after which a rollout is given up.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        block_size: int | None = None,
        num_blocks: int | None = None,
        max_memory_percent: float = 0.3,
        max_batch_tokens: int | None = None,
        time_limit: float = 600.0,
    ) -> None:
        _need(model)
        self.model = model
        self.time_limit = time_limit
        self.block_size, self.num_blocks = block_size, num_blocks
        self.max_memory_percent, self.max_batch_tokens = max_memory_percent, max_batch_tokens

    def update_weights(self, model: Any, step: int) -> None:
        """The model is the one that is trained; if the trainer has wrapped it anew, the new wrapper is taken."""
        self.model = model

    def close(self) -> None:
        """There is nothing to close: each rollout gives its cache back, for the backward pass needs the memory."""

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[Completion]:
        """One completion for each prompt, in their order. Empty list: empty list."""
        check_prompts(prompts, params)
        if not prompts:
            return []
        if params.min_p > 0:
            raise ValueError(f"min_p is {params.min_p}; transformers' continuous batching has no min-p. Cure: sampler 'transformers'.")
        model = inner_model(self.model)
        devices = [model.device] if model.device.type == "cuda" else []
        seed = params.seed if params.seed is not None else int(torch.randint(2**63 - 1, ()).item())
        state = random.getstate()
        with torch.random.fork_rng(devices), eval_mode(self.model):
            torch.manual_seed(seed)
            outputs = self._run(model, prompts, params, seed % 2**31)
        random.setstate(state)
        ends = set(end_tokens(params))
        completions = []
        for output, temperature in zip(outputs, params.temperatures, strict=True):
            ids = list(output.generated_tokens)
            logprobs = list(output.logprobs) if temperature > 0 else None
            completions.append(Completion(ids, bool(ids) and ids[-1] in ends, logprobs))
        return completions

    def _run(self, model: Any, prompts: Sequence[list[int]], params: SamplingParams, seed: int) -> list[Any]:
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig

        # A processor exists only where the default asks for it, and can then be set for each request: so no default may be neutral.
        processors: dict[str, Any] = {"temperature": 0.5, "top_k": params.top_k, "top_p": params.top_p}
        config = GenerationConfig(
            do_sample=True,
            max_new_tokens=params.max_new_tokens,
            eos_token_id=end_tokens(params),
            pad_token_id=params.pad_token_id,
            **processors,
        )
        size, blocks, tokens = self.block_size or (64 if model.device.type == "cpu" else 256), self.num_blocks, self.max_batch_tokens
        if model.device.type == "cpu":  # transformers would take gigabytes of the machine, for an attention mask of tokens times cache too
            blocks = blocks or 1 + sum(-(-(len(prompt) + params.max_new_tokens) // size) for prompt in prompts)
            tokens = tokens or max(256, len(prompts))
        batching = ContinuousBatchingConfig(
            block_size=size,
            num_blocks=blocks,
            max_batch_tokens=tokens,
            max_memory_percent=self.max_memory_percent,
            return_logprobs=True,
            per_request_processors=True,
            use_async_batching=False,
            seed=seed,
        )
        manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=batching)
        try:
            # All requests wait in the queue before the thread starts: so the batches, and with them the tokens, do not depend on the clock.
            names = [
                manager.add_request(
                    list(prompt),
                    request_id=f"row{index}",
                    max_new_tokens=params.max_new_tokens,
                    eos_token_id=end_tokens(params),
                    temperature=float(temperature) or GREEDY,
                )
                for index, (prompt, temperature) in enumerate(zip(prompts, params.temperatures, strict=True))
            ]
            manager.start()
            return self._collect(manager, names)
        finally:
            manager.stop(block=True, timeout=30)
            manager.destroy()

    def _collect(self, manager: Any, names: list[Any]) -> list[Any]:
        found: dict[str, Any] = {}
        while len(found) < len(names):
            output = manager.get_result(timeout=self.time_limit if manager.is_running() else 0.1)
            if output is None:
                raise SamplerError(
                    f"continuous batching: {len(found)} of {len(names)} completions came back, and then none for {self.time_limit:g} s "
                    f"(its thread is {'running' if manager.is_running() else 'dead; its log has the reason'}). "
                    "Cure: a larger time_limit, a smaller batch, or sampler 'transformers'."
                )
            if output.error is not None:
                raise SamplerError(f"continuous batching: {output.request_id} failed: {output.error}. Cure: sampler 'transformers'.")
            if output.is_finished():
                found[output.request_id] = output
        return [found[name] for name in names]


def _need(model: Any) -> None:
    """Say what is missing before the first rollout, not in it."""
    import transformers

    generation = importlib.import_module("transformers.generation")
    config = getattr(generation, "ContinuousBatchingConfig", None)
    fields = getattr(config, "__dataclass_fields__", {})
    if config is None or not {"per_request_processors", "return_logprobs"} <= set(fields):
        raise SamplerError(
            f"continuous batching: transformers {transformers.__version__} has no continuous batching with a temperature for each request; "
            "expected 5.17 or newer. Cure: pip install -U transformers, or sampler 'transformers'."
        )
    if not hasattr(inner_model(model), "init_continuous_batching"):
        raise TypeError(f"model is a {type(model).__name__}; expected a transformers model with init_continuous_batching.")
    if is_sharded(model):
        raise ValueError(
            "model is sharded over processes; continuous batching needs whole parameters. Cure: sampler 'transformers' or 'vllm'."
        )
