"""The bodies of requests to a vLLM server, for its two routes that return completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo_fast.generation.protocol import SamplingParams, end_tokens

__all__ = ["COMPLETIONS", "GENERATE", "NO_TOP_K", "completion_body", "generate_body", "sampling_settings"]

COMPLETIONS = "/v1/completions"
GENERATE = "/inference/v1/generate"  # of vLLM 0.32, with --enable-scale-out; its replies have sampling masks
OF_REQUESTS = ("priority", "cache_salt", "session_id", "user", "use_beam_search")  # and not of SamplingParams; `GENERATE` has the first two
NO_TOP_K = 2**30  # more than any vocabulary has


def sampling_settings(params: SamplingParams, temperature: float, seed: int | None, *, masks: bool = False) -> dict[str, Any]:
    """The settings of sampling, which have the same names in both routes.

    Every setting is given, because the server takes others from the model's generation_config.json.

    Args:
        params: how to sample.
        temperature: of this completion.
        seed: of this completion; None = the server's choice.
        masks: the server was started with ``--return-sampling-mask``, and refuses top_k = 0 and the temperature 0. Then the largest top_k
            stands for none, and top_k = 1 for greedy decoding: the distributions are the same.
    """
    greedy = masks and temperature == 0
    return {
        "n": 1,
        "temperature": 1.0 if greedy else temperature,
        "top_p": 1.0 if greedy else params.top_p,
        "top_k": 1 if greedy else params.top_k or (NO_TOP_K if masks else 0),
        "min_p": 0.0 if greedy else params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": params.max_new_tokens,
        "min_tokens": 0,
        "ignore_eos": True,  # only stop_token_ids end a completion, not the end token that the server finds in the model
        "stop_token_ids": end_tokens(params),
        "skip_special_tokens": False,
        **params.generation_kwargs,
        **({} if seed is None else {"seed": seed}),
    }


def completion_body(model: str, prompt: Sequence[int], settings: dict[str, Any], logprobs: int = 0) -> dict[str, Any]:
    """The body of a request to `COMPLETIONS`; ``logprobs``: how many of the largest to return, beside those of the sampled tokens."""
    extra = {"logprobs": logprobs, "return_token_ids": True, "return_tokens_as_token_ids": True}
    return {"model": model, "prompt": list(prompt), **settings, **extra}


def generate_body(model: str, prompt: Sequence[int], settings: dict[str, Any]) -> dict[str, Any]:
    """The body of a request to `GENERATE`."""
    sampling = {name: value for name, value in settings.items() if name not in OF_REQUESTS} | {"logprobs": 0, "detokenize": False}
    request = {name: settings[name] for name in OF_REQUESTS[:2] if name in settings}
    fixed = {"output_mode": "tokens", "return_token_ids": True}
    return {"model": model, "token_ids": list(prompt), "sampling_params": sampling, **request, **fixed}
