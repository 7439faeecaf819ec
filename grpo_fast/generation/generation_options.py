"""The options of ``generation_kwargs``: which ones a sampler takes, and what each does to the distribution that it draws from.

An option that the loss cannot know about must be known here: otherwise the policy that is trained is silently another one than the policy
that sampled. So every option is in one of four classes (it is neutral, it truncates, it penalises, or it is refused with a reason), and an
option that is in none of them is refused as unknown.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo_fast.utils.dataclass_options import suggest

__all__ = ["CACHE_OPTIONS", "check_generation_options", "penalties_of", "truncations_of"]

CACHE_OPTIONS = ("use_cache", "cache_config", "max_cache_len", "prefill_chunk_size", "disable_compile", "compile_config")
"""Options of transformers' key-value cache and compilation, which do not change the distribution."""

_OWN_SETTING = "it is a setting of its own. Fix: "
_END_TOKENS = "completions end at the end tokens of the model and its tokenizer. Fix: set those there"
_ASSISTED = "it is for assisted decoding, in which another process than this sampler draws tokens. Fix: leave it out"
_OUTPUT = "the sampler decides on what `generate` returns. Fix: leave it out"
_ENCODER = "it is for models with an encoder. Fix: leave it out"
_BEAMS = "beam search does not sample, and the loss needs completions that are drawn from the policy. Fix: leave it out"
_REQUEST = "the sampler sets it for each request. Fix: leave it out"
_SAMPLES = "the loss needs completions that are drawn from the policy. Fix: do_sample=True, or leave it out"
_DIVERGED = "it would hide that the weights have diverged. Fix: leave it out"


@dataclass(frozen=True)
class _Options:
    """The options that a sampler knows.

    Args:
        penalties: change the probabilities otherwise than by temperature and truncation; the value that has no effect, by name.
        truncations: likewise, of those that leave tokens out by their probability: like top-p, they have kept sets, over which the loss
            can be computed.
        neutral: do not change the distribution.
        fixed: only this value is possible, and has no effect.
        refused: reasons, by name.
    """

    penalties: Mapping[str, object]
    truncations: Mapping[str, object] = field(default_factory=dict)
    neutral: Collection[str] = ()
    fixed: Mapping[str, object] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def known(self) -> list[str]:
        """Names of the options that can be set."""
        return sorted([*self.penalties, *self.truncations, *self.neutral])


_SETTINGS = {name: f"{_OWN_SETTING}{name}" for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
_TRANSFORMERS_PENALTIES: dict[str, object] = {
    "sequence_bias": {},
    "no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "min_new_tokens": 0,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
_TRANSFORMERS_REFUSED = {
    **_SETTINGS,
    "max_new_tokens": f"{_OWN_SETTING}max_completion_length",
    "max_length": f"{_OWN_SETTING}max_completion_length",
    "num_return_sequences": f"{_OWN_SETTING}num_generations",
    "cache_implementation": "it is an option of the sampler. Fix: sampler_options={'cache_implementation': ...}",
    "eos_token_id": _END_TOKENS,
    "pad_token_id": _END_TOKENS,
    "bos_token_id": "it has no effect on a model without an encoder. Fix: leave it out",
    "do_sample": _SAMPLES,
    **dict.fromkeys(
        ("num_beams", "num_beam_groups", "early_stopping", "length_penalty", "diversity_penalty", "constraints", "force_words_ids"), _BEAMS
    ),
    **dict.fromkeys(("penalty_alpha", "dola_layers"), "such decoding does not sample from the policy. Fix: leave it out"),
    **dict.fromkeys(
        ("assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind", "is_assistant"),
        _ASSISTED,
    ),
    **dict.fromkeys(
        ("max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "prompt_lookup_num_tokens"), _ASSISTED
    ),
    **dict.fromkeys(("speculation_type", "target_lookbehind", "use_mtp"), _ASSISTED),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate", "renormalize_logits"),
        _OUTPUT,
    ),
    **dict.fromkeys(
        ("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "decoder_start_token_id", "forced_bos_token_id"), _ENCODER
    ),
    "forced_eos_token_id": "a completion that was cut at the length limit would look finished. Fix: mask_truncated_completions",
    "min_length": "it counts the tokens of the prompt too. Fix: min_new_tokens",
    "stop_strings": "a completion ends at an end token, or at the length limit. Fix: an end token of the tokenizer",
    "max_time": "the clock would decide where completions end. Fix: max_completion_length",
    "token_healing": "it changes the prompts. Fix: leave it out",
    "guidance_scale": "it runs the model on other prompts too, which the loss does not know. Fix: leave it out",
    "watermarking_config": "it changes the distribution after sampling has been prepared. Fix: leave it out",
    "remove_invalid_values": _DIVERGED,
    "low_memory": "it has no effect on sampling. Fix: leave it out",
    "continuous_batching_config": "it is an option of the sampler. Fix: sampler='continuous_batching' with sampler_options",
}
_TRANSFORMERS = _Options(
    penalties=_TRANSFORMERS_PENALTIES,
    truncations={"top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0},
    neutral=CACHE_OPTIONS,
    fixed={"do_sample": True, "num_beams": 1},
    refused=_TRANSFORMERS_REFUSED,
)
_OPTIONS = {
    "transformers": _TRANSFORMERS,
    "continuous_batching": _Options(
        penalties=_TRANSFORMERS.penalties,
        truncations=_TRANSFORMERS.truncations,
        fixed=_TRANSFORMERS.fixed,
        refused={
            **_TRANSFORMERS_REFUSED,
            **dict.fromkeys(CACHE_OPTIONS, "continuous batching has a cache of its own. Fix: sampler_options"),
        },
    ),
    "vllm": _Options(
        penalties={
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": {},
            "allowed_token_ids": None,
            "bad_words": [],
            "min_tokens": 0,
            "structured_outputs": None,
            "thinking_token_budget": None,
        },
        neutral=("priority", "cache_salt", "session_id", "user"),
        fixed={"use_beam_search": False, "n": 1},
        refused={
            **_SETTINGS,
            "max_tokens": f"{_OWN_SETTING}max_completion_length",
            "n": f"{_OWN_SETTING}num_generations",
            "best_of": "the best of several completions is not drawn from the policy. Fix: num_generations",
            "seed": f"{_OWN_SETTING}seed",
            "use_beam_search": _BEAMS,
            "length_penalty": _BEAMS,
            "stop_token_ids": _END_TOKENS,
            "ignore_eos": _END_TOKENS,
            "stop": "a completion ends at an end token, or at the length limit. Fix: an end token of the tokenizer",
            "include_stop_str_in_output": "there are no stop strings. Fix: leave it out",
            "repetition_detection": "a completion ends at an end token, or at the length limit. Fix: the reward 'repetition'",
            "truncate_prompt_tokens": "it changes the prompts. Fix: grpo_fast.data.load_prompts(..., max_prompt_length=...)",
            "add_special_tokens": "prompts are sent as tokens. Fix: leave it out",
            "watermarking": "it draws tokens by a key, and not at random. Fix: leave it out",
            "response_format": "it has another name here. Fix: structured_outputs",
            "vllm_xargs": "what a plug-in of the server does with it is not known here. Fix: leave it out",
            **dict.fromkeys(("model", "prompt", "stream", "echo", "suffix", "logprobs", "prompt_logprobs", "request_id"), _REQUEST),
            **dict.fromkeys(("return_token_ids", "return_tokens_as_token_ids", "skip_special_tokens", "logprob_token_ids"), _REQUEST),
        },
    ),
}


def check_generation_options(sampler: str, options: Mapping[str, Any]) -> None:
    """Check that a sampler of this name takes these options; the trainer does so before it loads a model.

    Args:
        sampler: one of SAMPLERS.
        options: ``generation_kwargs``.

    Raises:
        ValueError: an option is unknown, collides with a setting, ends sampling from the policy, or has a wrong value; it names the option.
    """
    table = _OPTIONS[sampler]
    for name, value in options.items():
        if name in table.fixed and value == table.fixed[name]:
            continue
        if name in table.refused:
            raise ValueError(f"generation_kwargs: {name} is {value!r}, which sampler {sampler!r} does not take: {table.refused[name]}.")
        if name not in table.known:
            hint = suggest(name, table.known).removesuffix(" See --help.")
            raise ValueError(
                f"generation_kwargs: {name} is {value!r}; sampler {sampler!r} has no such option.{hint} It has {', '.join(table.known)}."
            )
    if sampler != "vllm":
        from grpo_fast.generation.logits_processing import check_values

        check_values(options)


def penalties_of(sampler: str, options: Mapping[str, Any]) -> list[str]:
    """Names of the options that change the probabilities otherwise than by temperature and truncation."""
    return _effective(options, _OPTIONS[sampler].penalties)


def truncations_of(sampler: str, options: Mapping[str, Any]) -> list[str]:
    """Names of the options that leave tokens out by their probability."""
    return _effective(options, _OPTIONS[sampler].truncations)


def _effective(options: Mapping[str, Any], without_effect: Mapping[str, object]) -> list[str]:
    return [name for name, value in options.items() if name in without_effect and value is not None and value != without_effect[name]]
