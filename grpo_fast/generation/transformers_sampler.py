"""Sampling with `generate` of the model that is trained: there is no server to start and there are no weights to send."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from grpo_fast.generation.generation_options import CACHE_OPTIONS, check_generation_options
from grpo_fast.generation.kept_sets import KeptSetRecorder
from grpo_fast.generation.logits_processing import PaddedPenalties, has_penalties, truncation_warpers
from grpo_fast.generation.prompt_cache import shared_prompt_cache
from grpo_fast.generation.protocol import Completion, SamplingParams, check_prompts, end_tokens
from grpo_fast.models.unwrap import eval_mode, inner_model, is_sharded, whole_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["RowSampler", "TransformersSampler"]


class TransformersSampler:
    """Samples with `generate` of the model that is trained, with a temperature per row.

    - `RowSampler` draws the tokens with its own generator. The state of torch's global generator does not change, so a resumed run
      draws the same completions as an uninterrupted one.
    - The model's generation_config is not used, so that do_sample=False, a top-k of 50 or a repetition penalty in it has no effect.
    - Penalties (``repetition_penalty``, ``generation_kwargs``) come before the temperature, and do not count padding as text.
    - With truncated sampling (top-k, top-p, min-p) it returns the sets of kept tokens, if asked for.
    - The prompt of a group is computed once, and its completions start from copies of its keys and values.
    - The model runs under the autocast that is in force where `generate` is called, as in the trainer.
    - The model is in eval mode while completions are drawn; afterwards every module is in its previous mode.

    Args:
        model: the causal language model, wrapped (DDP, PEFT, torch.compile, FSDP) or not.
        tokenizer: not used.
        batch_size: largest number of rows per call of `generate`; None = all. Rows of similar length share a call, which saves padding.
            It decides which random numbers a row gets, so keep it to reproduce a run.
        cache_implementation: transformers' name of the key-value cache, such as "static" for compilation; None = its default.
        share_prompts: compute equal prompts of a call once, with transformers' default cache, unless the model is sharded. False: never.

    Raises:
        ValueError: ``batch_size`` is below 1.
        TypeError: the model has no method `generate`.
    """

    returns_support = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int | None = None,
        cache_implementation: str | None = None,
        share_prompts: bool = True,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1, or None for all prompts at once.")
        if not hasattr(inner_model(model), "generate"):
            raise TypeError(f"model is a {type(model).__name__}; expected a transformers model with a method generate.")
        self.model = model
        self.batch_size = batch_size
        self.cache_implementation = cache_implementation
        self.share_prompts = share_prompts

    def update_weights(self, model: PreTrainedModel | nn.Module, step: int) -> None:
        """Use this model, which is the one that is trained; the trainer may have wrapped it since."""
        self.model = model

    def close(self) -> None:
        """Do nothing: there are no resources to release."""

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[Completion]:
        """Draw one completion per prompt, in the order of the prompts.

        Raises:
            ValueError: ``params`` do not fit the prompts.
            FloatingPointError: the model's logits are not finite.
        """
        check_prompts(prompts, params)
        check_generation_options("transformers", params.generation_kwargs)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # rows of similar length share a call
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
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        temperatures: list[float],
        params: SamplingParams,
        generator: torch.Generator,
    ) -> list[Completion]:
        from transformers import GenerationConfig, LogitsProcessorList

        device = _device(model)
        width = max(map(len, prompts))
        input_ids = torch.tensor([[params.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device)  # [B, P]
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        # [B, P], from the lengths and not from the ids, because a prompt may contain the pad token
        attention_mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        row_sampler = RowSampler(temperatures, params, generator)
        processors: LogitsProcessorList = LogitsProcessorList([row_sampler])
        if has_penalties(params):
            processors.insert(0, PaddedPenalties(params, [len(p) for p in prompts], device))
        cache_options = {name: value for name, value in params.generation_kwargs.items() if name in CACHE_OPTIONS}
        cache = None
        # All processes of a sharded model must run the same number of forward passes.
        if self.share_prompts and self.cache_implementation is None and not cache_options and not is_sharded(self.model):
            cache = shared_prompt_cache(model, prompts, input_ids, attention_mask)
        config = GenerationConfig(
            do_sample=False,  # the maximum of the scores that RowSampler returns is the token it has drawn
            max_new_tokens=params.max_new_tokens,
            eos_token_id=end_tokens(params),
            pad_token_id=params.pad_token_id,
            cache_implementation=self.cache_implementation,
            **({"use_cache": True} | cache_options),
        )
        sequences = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=processors,
            **({} if cache is None else {"past_key_values": cache}),
            synced_gpus=is_sharded(self.model) and torch.distributed.is_initialized(),
        )
        drawn = sequences[:, width:]  # [B, T]
        return _completions(drawn, row_sampler, temperatures, params)


class RowSampler:
    """A logits processor that draws one token per row: row b from softmax(z_b / T_b) after truncation, or greedily where T_b is 0.

    It uses the Gumbel-max trick: argmax(s - log E) with independent exponential E is a sample of softmax(s). So the processor returns
    s - log E, and greedy `generate` selects the sampled token. The log-probability of that token is computed at once, so that no scores
    [B, V] have to be kept.

    Args:
        temperatures: [B], >= 0.
        params: top_k, top_p, min_p and the truncations of generation_kwargs, applied to s = z/T in this order.
        generator: source of E, on the device of the logits.
    """

    def __init__(self, temperatures: Sequence[float], params: SamplingParams, generator: torch.Generator) -> None:
        self.params = params
        self.generator = generator
        self.greedy = [temperature == 0 for temperature in temperatures]
        self._temperature = torch.tensor([temperature or 1.0 for temperature in temperatures])
        self._noise_scale = torch.tensor([0.0 if greedy else 1.0 for greedy in self.greedy])
        self._logprobs: list[Tensor] = []
        self.recorder = KeptSetRecorder() if params.return_support and params.truncates else None

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Return perturbed scores, float32 [B, V], whose row-wise maximum is the drawn token.

        Args:
            input_ids: not used.
            logits: float [B, V].
        """
        self._temperature = self._temperature.to(logits.device)
        self._noise_scale = self._noise_scale.to(logits.device)
        scores = logits.float() / self._temperature[:, None]
        if self.params.truncates:
            whole = scores
            scores = truncate(whole, self.params)
            if self.recorder is not None:
                self.recorder.record(whole, scores)
        noise = torch.empty_like(scores).exponential_(generator=self.generator)
        noise = noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_().mul_(self._noise_scale[:, None])
        perturbed = scores - noise
        token = perturbed.argmax(-1, keepdim=True)
        # The same as score - logsumexp(scores), but exact also where the token is almost certain.
        self._logprobs.append(-(scores - scores.gather(-1, token)).logsumexp(-1))
        return perturbed

    def logprobs(self, drawn: Tensor) -> Tensor:
        """Log-probabilities of the drawn tokens, float32 [B, T]; values after the end of a completion are meaningless.

        Args:
            drawn: int64 [B, T], the tokens that `generate` returned.
        """
        found = torch.stack(self._logprobs, 1) if self._logprobs else drawn.new_zeros(drawn.shape, dtype=torch.float32)
        return found[:, : drawn.shape[1]]


def truncate(scores: Tensor, params: SamplingParams) -> Tensor:
    """Set the scores of the tokens that truncation leaves out to -inf, with transformers' own warpers.

    Args:
        scores: float [B, V], z/T.
        params: top_k, top_p, min_p and the truncations of generation_kwargs, applied in this order.
    """
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    unused = scores.new_empty(0, dtype=torch.long)  # the token ids, which these warpers do not read
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(unused, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(unused, scores)
    if params.min_p > 0:
        scores = MinPLogitsWarper(params.min_p)(unused, scores)
    for warper in truncation_warpers(params.generation_kwargs, scores.device):
        scores = warper(unused, scores)
    return scores


def _completions(drawn: Tensor, row_sampler: RowSampler, temperatures: list[float], params: SamplingParams) -> list[Completion]:
    ends, recorder = set(end_tokens(params)), row_sampler.recorder
    completions = []
    for row, (ids, values, temperature) in enumerate(zip(drawn.tolist(), row_sampler.logprobs(drawn).tolist(), temperatures, strict=True)):
        end = next((position for position, token in enumerate(ids) if token in ends), None)
        length = len(ids) if end is None else end + 1
        if any(math.isnan(value) for value in values[:length]):
            raise FloatingPointError("generate: the model's logits are not finite; expected finite numbers. The weights have diverged.")
        logprobs = values[:length] if temperature > 0 else None
        support, kept_mass = (None, None) if recorder is None or logprobs is None else recorder.of_row(row, length)
        completions.append(Completion(ids[:length], end is not None, logprobs, support, kept_mass))
    return completions


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()).item())  # so that torch.manual_seed makes a call reproducible
    return torch.Generator(device).manual_seed(seed)


def _device(model: PreTrainedModel) -> torch.device:
    return torch.device(model.device)


@contextmanager
def _plain_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Replace the model's generation_config, from which `generate` takes what its arguments do not set (top_k, penalties, ...)."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
