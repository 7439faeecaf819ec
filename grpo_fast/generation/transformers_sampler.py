"""Rollouts by transformers' `generate`, of the very model that is trained: nothing to start, nothing to synchronise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grpo_fast.generation.protocol import Completion, SamplingParams, check_prompts, end_tokens
from grpo_fast.models.unwrap import eval_mode, inner_model, is_sharded, whole_parameters

__all__ = ["RowSampler", "TransformersSampler"]


class TransformersSampler:
    """`generate` of the model that is trained, with a temperature of its own for each row.

    - The tokens are drawn by `RowSampler`, from a generator of their own: torch's global random numbers are left as they were, so a
      resumed run draws what an uninterrupted one does.
    - The model's generation_config plays no part: neither do_sample=False nor a top-k of 50 nor a repetition penalty can slip in.
    - The model is put into eval mode for the rollout and every module back into its own mode after it.

    Args:
        model: the causal language model, wrapped (DDP, PEFT, torch.compile, FSDP) or not.
        batch_size: rows per call of `generate`, at most; None = all at once. Rows of like length share a call, so fewer pads are computed.
            It decides which random numbers a row gets: keep it to reproduce a run.
        cache_implementation: transformers' name of the key-value cache ("static" to compile, say); None = its default.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, batch_size: int | None = None, cache_implementation: str | None = None
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1, or None for all prompts at once.")
        if not hasattr(inner_model(model), "generate"):
            raise TypeError(f"model is a {type(model).__name__}; expected a transformers model with a method generate.")
        self.model = model
        self.batch_size = batch_size
        self.cache_implementation = cache_implementation

    def update_weights(self, model: Any, step: int) -> None:
        """The model is the one that is trained; if the trainer has wrapped it anew, the new wrapper is taken."""
        self.model = model

    def close(self) -> None:
        """There is nothing to close."""

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[Completion]:
        """One completion for each prompt, in their order. Empty list: empty list."""
        check_prompts(prompts, params)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # stable: like lengths together, few pads
        size = self.batch_size or max(len(prompts), 1)
        model = inner_model(self.model)
        generator = _generator(params.seed, _device(model))
        completions: list[Completion | None] = [None] * len(prompts)
        with eval_mode(self.model), whole_parameters(self.model), _plain_generation_config(model):
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                found = self._generate_rows(model, [prompts[i] for i in rows], [params.temperatures[i] for i in rows], params, generator)
                for index, completion in zip(rows, found, strict=True):
                    completions[index] = completion
        return [completion for completion in completions if completion is not None]

    def _generate_rows(
        self, model: Any, prompts: list[list[int]], temperatures: list[float], params: SamplingParams, generator: torch.Generator
    ) -> list[Completion]:
        from transformers import GenerationConfig, LogitsProcessorList

        device = _device(model)
        width = max(map(len, prompts))
        input_ids = torch.tensor([[params.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device)  # [B, P]
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        attention_mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()  # [B, P]; a pad id inside a prompt counts
        row_sampler = RowSampler(temperatures, params, generator)
        config = GenerationConfig(
            do_sample=False,  # the row sampler has drawn already: what is left to do is to take the maximum
            max_new_tokens=params.max_new_tokens,
            eos_token_id=end_tokens(params),
            pad_token_id=params.pad_token_id,
            use_cache=True,
            cache_implementation=self.cache_implementation,
        )
        sequences = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([row_sampler]),
            synced_gpus=is_sharded(self.model) and torch.distributed.is_initialized(),
        )
        drawn = sequences[:, width:]  # [B, T]
        return _completions(drawn, row_sampler.logprobs(drawn), temperatures, params)


class RowSampler:
    """Draws one token per row, as a logits processor: row b from softmax(z_b / T_b) after truncation, or greedily where T_b is 0.

    By the Gumbel-max rule the token is argmax(s - log E), E exponential and independent: so the processor returns s - log E, and greedy
    `generate` takes what was drawn. Only [B, V] numbers live at a time; the drawn token's log-probability is taken from them at once.

    Args:
        temperatures: [B], >= 0.
        params: top_k, top_p and min_p, applied to s = z/T in this order.
        generator: source of E, on the device of the logits.
    """

    def __init__(self, temperatures: Sequence[float], params: SamplingParams, generator: torch.Generator) -> None:
        self.params = params
        self.generator = generator
        self.greedy = [temperature == 0 for temperature in temperatures]
        self._temperature = torch.tensor([temperature or 1.0 for temperature in temperatures])
        self._noise_scale = torch.tensor([0.0 if greedy else 1.0 for greedy in self.greedy])
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """``logits`` [B, V] -> perturbed scores [B, V], float32, whose row-wise maximum is the token drawn."""
        self._temperature = self._temperature.to(logits.device)
        self._noise_scale = self._noise_scale.to(logits.device)
        scores = logits.float() / self._temperature[:, None]
        if self.params.truncates:
            scores = truncate(scores, self.params)
        noise = torch.empty_like(scores).exponential_(generator=self.generator)
        noise = noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_().mul_(self._noise_scale[:, None])
        perturbed = scores - noise
        token = perturbed.argmax(-1, keepdim=True)
        self._logprobs.append(-(scores - scores.gather(-1, token)).logsumexp(-1))  # no worse where almost certain
        return perturbed

    def logprobs(self, drawn: Tensor) -> Tensor:
        """Log-probabilities [B, T] of the tokens drawn; what lies behind a row's end is meaningless."""
        found = torch.stack(self._logprobs, 1) if self._logprobs else drawn.new_zeros(drawn.shape, dtype=torch.float32)
        return found[:, : drawn.shape[1]]


def truncate(scores: Tensor, params: SamplingParams) -> Tensor:
    """-inf for the tokens that top-k, top-p and min-p leave out. ``scores`` [B, V] = z/T.

    By transformers' own warpers, in the order in which its `generate` applies them.
    """
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    none: Any = None  # the warpers take ids and do not look at them
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(none, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(none, scores)
    if params.min_p > 0:
        scores = MinPLogitsWarper(params.min_p)(none, scores)
    return scores


def _completions(drawn: Tensor, logprobs: Tensor, temperatures: list[float], params: SamplingParams) -> list[Completion]:
    ends = set(end_tokens(params))
    completions = []
    for ids, values, temperature in zip(drawn.tolist(), logprobs.tolist(), temperatures, strict=True):
        end = next((position for position, token in enumerate(ids) if token in ends), None)
        length = len(ids) if end is None else end + 1
        if any(math.isnan(value) for value in values[:length]):
            raise FloatingPointError("generate: the model's logits are not finite; expected finite numbers. The weights have diverged.")
        completions.append(Completion(ids[:length], end is not None, values[:length] if temperature > 0 else None))
    return completions


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()).item())  # so torch.manual_seed before a call decides its outcome
    return torch.Generator(device).manual_seed(seed)


def _device(model: Any) -> torch.device:
    return torch.device(model.device)


@contextmanager
def _plain_generation_config(model: Any) -> Iterator[None]:
    """`generate` fills what a GenerationConfig leaves open from the model's own (top_k, penalties, forced tokens): take that away."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
