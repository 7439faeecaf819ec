"""Sampling with transformers' continuous batching: finished rows leave the batch, so that no forward pass is spent on them."""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from grpo_fast.generation.generation_options import check_generation_options
from grpo_fast.generation.kept_sets import KeptSetRecorder
from grpo_fast.generation.logits_processing import has_penalties
from grpo_fast.generation.paged_model import run_as_here
from grpo_fast.generation.protocol import Completion, SamplerError, SamplingParams, check_prompts, end_tokens
from grpo_fast.models.unwrap import eval_mode, inner_model, is_sharded

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.continuous_batching import ContinuousBatchingManager, GenerationOutput

__all__ = ["ContinuousBatchingSampler"]

# transformers decides for all requests at once whether to sample; sampling at this temperature is the same as greedy decoding.
GREEDY_TEMPERATURE = 1e-4


class ContinuousBatchingSampler:
    """Samples with transformers' paged scheduler over the model that is trained: a preview feature of transformers, tested with 5.17 to
    5.24. It runs under the autocast that is in force where `generate` is called.

    Each request has its own temperature, top-k and top-p. It pays off where lengths differ much; on a GPU it needs flash attention to be
    fast.

    Args:
        model: the causal language model, wrapped (DDP, PEFT, torch.compile) or not. Sharded parameters (FSDP, DeepSpeed ZeRO-3) are not
            supported.
        tokenizer: not used.
        block_size: tokens in a block of the key-value cache; None = 256 (the block size of flash attention), 64 on a CPU.
        num_blocks: blocks in the cache; None = as many as fit into ``max_memory_percent`` of the free memory; on a CPU as many as the
            prompts need.
        max_memory_percent: share of the free memory for the cache. The default leaves room for the backward pass.
        max_batch_tokens: tokens in one forward pass; None = transformers' choice; on a CPU 256, or one per prompt if that is more.
        time_limit: seconds without a finished completion after which an error is raised.

    Raises:
        SamplerError: transformers is too old.
        TypeError, ValueError: the model cannot be used.
    """

    returns_support = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        block_size: int | None = None,
        num_blocks: int | None = None,
        max_memory_percent: float = 0.3,
        max_batch_tokens: int | None = None,
        time_limit: float = 600.0,
    ) -> None:
        _check_requirements(model)
        self.model = model
        self.time_limit = time_limit
        self.block_size, self.num_blocks = block_size, num_blocks
        self.max_memory_percent, self.max_batch_tokens = max_memory_percent, max_batch_tokens

    def update_weights(self, model: PreTrainedModel | nn.Module, step: int) -> None:
        """Use this model, which is the one that is trained; the trainer may have wrapped it since."""
        self.model = model

    def close(self) -> None:
        """Do nothing: each call of `generate` frees its cache, because the backward pass needs the memory."""

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[Completion]:
        """Draw one completion per prompt, in the order of the prompts.

        Raises:
            ValueError: ``params`` do not fit the prompts, or use min-p.
            SamplerError: a request failed or took too long.
        """
        check_prompts(prompts, params)
        check_generation_options("continuous_batching", params.generation_kwargs)
        if not prompts:
            return []
        if params.min_p > 0:
            raise ValueError(f"min_p is {params.min_p}; transformers' continuous batching has no min-p. Fix: sampler 'transformers'.")
        model = inner_model(self.model)
        devices = [model.device] if model.device.type == "cuda" else []
        seed = params.seed if params.seed is not None else int(torch.randint(2**63 - 1, ()).item())
        recorder = KeptSetRecorder() if params.return_support and params.truncates else None
        state = random.getstate()
        with torch.random.fork_rng(devices), eval_mode(self.model):
            torch.manual_seed(seed)
            outputs = self._run(model, prompts, params, seed % 2**31, recorder)
        random.setstate(state)
        ends = set(end_tokens(params))
        completions = []
        for row, (output, temperature) in enumerate(zip(outputs, params.temperatures, strict=True)):
            ids = list(output.generated_tokens)
            logprobs = list(output.logprobs) if temperature > 0 else None
            support, kept_mass = (None, None) if recorder is None or logprobs is None else recorder.of_row(row, len(ids))
            completions.append(Completion(ids, bool(ids) and ids[-1] in ends, logprobs, support, kept_mass))
        return completions

    def _run(
        self,
        model: PreTrainedModel,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        seed: int,
        recorder: KeptSetRecorder | None,
    ) -> list[GenerationOutput]:
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig

        from grpo_fast.generation.continuous_batching_sets import add_processors

        # transformers creates a logits processor, which requests can then set, only if the default is not neutral.
        processors: dict[str, Any] = {"temperature": 0.5, "top_k": params.top_k, "top_p": params.top_p}
        config = GenerationConfig(
            do_sample=True,
            max_new_tokens=params.max_new_tokens,
            eos_token_id=end_tokens(params),
            pad_token_id=params.pad_token_id,
            **processors,
        )
        size, blocks, tokens = self.block_size or (64 if model.device.type == "cpu" else 256), self.num_blocks, self.max_batch_tokens
        if model.device.type == "cpu":  # transformers would reserve gigabytes, also for an attention mask of tokens times cache
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
        if recorder is not None or has_penalties(params):
            batching.use_cuda_graph = False  # the sizes of sets, and the tokens of rows, are read at each step
        manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=batching)
        try:
            by_row = add_processors(manager, params, prompts, model.device, recorder)
            run_as_here(manager, model)
            # All requests are queued before the thread starts, so that the batches, and with them the tokens, do not depend on timing.
            request_ids = [
                manager.add_request(
                    list(prompt),
                    request_id=f"row{index}",
                    max_new_tokens=params.max_new_tokens,
                    eos_token_id=end_tokens(params),
                    temperature=float(temperature) or GREEDY_TEMPERATURE,
                    **({"row": index} if by_row else {}),
                )
                for index, (prompt, temperature) in enumerate(zip(prompts, params.temperatures, strict=True))
            ]
            manager.start()
            return self._collect(manager, request_ids)
        finally:
            manager.stop(block=True, timeout=30)
            manager.destroy()

    def _collect(self, manager: ContinuousBatchingManager, request_ids: Sequence[str]) -> list[GenerationOutput]:
        """Wait for all requests; their outputs in the order of the requests."""
        found: dict[str, GenerationOutput] = {}
        while len(found) < len(request_ids):
            output = manager.get_result(timeout=self.time_limit if manager.is_running() else 0.1)
            if output is None:
                raise SamplerError(
                    f"continuous batching: {len(found)} of {len(request_ids)} completions came back, then none for {self.time_limit:g} s "
                    f"(its thread is {'running' if manager.is_running() else 'dead; its log has the reason'}). "
                    "Fix: a larger time_limit, a smaller batch, or sampler 'transformers'."
                )
            if output.error is not None:
                raise SamplerError(f"continuous batching: {output.request_id} failed: {output.error}. Fix: sampler 'transformers'.")
            if output.is_finished():
                found[output.request_id] = output
        return [found[request_id] for request_id in request_ids]


def _check_requirements(model: PreTrainedModel | nn.Module) -> None:
    """Check transformers and the model when the sampler is made, rather than in the first rollout."""
    import transformers

    generation = importlib.import_module("transformers.generation")
    config = getattr(generation, "ContinuousBatchingConfig", None)
    fields = getattr(config, "__dataclass_fields__", {})
    if config is None or not {"per_request_processors", "return_logprobs"} <= set(fields):
        raise SamplerError(
            f"continuous batching: transformers {transformers.__version__} has no continuous batching with a temperature for each request; "
            "expected 5.17 or newer. Fix: pip install -U transformers, or sampler 'transformers'."
        )
    if not hasattr(inner_model(model), "init_continuous_batching"):
        raise TypeError(f"model is a {type(model).__name__}; expected a transformers model with init_continuous_batching.")
    if is_sharded(model):
        raise ValueError(
            "model is sharded over processes; continuous batching needs whole parameters. Fix: sampler 'transformers' or 'vllm'."
        )
