"""Sampling with a vLLM server, ``vllm serve`` on other GPUs or another machine, over HTTP."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from grpo_fast.generation.generation_options import check_generation_options
from grpo_fast.generation.protocol import Completion, SamplerError, SamplingParams, check_prompts
from grpo_fast.generation.vllm_answer import AnswerReader, is_count
from grpo_fast.generation.vllm_http import START_COMMAND, ServerClient
from grpo_fast.generation.vllm_requests import COMPLETIONS, GENERATE, completion_body, generate_body, sampling_settings
from grpo_fast.generation.vllm_sets import KeptSetSource
from grpo_fast.generation.vllm_versions import WeightVersions
from grpo_fast.generation.vllm_weights import WeightSync, make_weight_sync
from grpo_fast.models.unwrap import unwrap

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["VLLMSampler"]

MIN_TEMPERATURE = 0.01  # vLLM raises lower temperatures, except 0, to this
BYTES_PER_ID = 40  # of a set in a reply, at most
MOST_IDS = 4096  # of a set without top_k, on average over a completion


class VLLMSampler:
    """Samples with a vLLM server.

    Start the server like this; the environment variable enables the endpoints that replace weights::

        VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --dtype float32 --logprobs-mode processed_logprobs

    ``--dtype`` is that of the trainer: float32, or bfloat16 with ``bf16``. By default vLLM takes bfloat16 for a model in float32.

    Each completion is a separate request with its own temperature and seed, because one request with a seed would draw all members of
    a group from the same random numbers. The server's prefix cache shares the work on equal prompts. The server's defaults
    (generation_config.json) are not used, and the end tokens are those of the params.

    By default vLLM reports log-probabilities of softmax(z), whatever the temperature, and an importance ratio against those is wrong from
    the first step. So before the first completions the sampler requests one token at two temperatures, and raises an error if the
    reported log-probabilities do not depend on the temperature.

    With ``SamplingParams.return_support`` it returns the sets that truncation has kept. A server with ``--return-sampling-mask`` and
    ``--enable-scale-out`` (vLLM 0.32 on a GPU, with ``VLLM_USE_V2_MODEL_RUNNER=1``) lists them. From any other, ``top_k`` and some more
    log-probabilities of each token are requested, and those that are not -inf are its set, so it needs ``--max-logprobs`` above ``top_k``.
    A set that may have more tokens than the server has reported is an error.

    Args:
        model: the causal language model that is trained, for `update_weights`.
        tokenizer: not used.
        url: address of the server.
        served_model: the name under which it serves the model; None = the first that it lists.
        concurrency: number of simultaneous requests.
        timeout: seconds that one completion may take.
        retry_seconds: how long a request is repeated while the server is down, overloaded, or sends incomplete answers.
        api_key: None = the environment variable VLLM_API_KEY, if set.
        weight_sync: "nccl" (from GPU to GPU; needs vllm installed here too, and ``--weight-transfer-config '{"backend": "nccl"}'`` there),
            "disk" (a folder that both sides see), "none" (the server keeps its weights, for evaluation), or "auto": nccl if the model is
            on a GPU and vllm is installed, else disk.
        weights_dir: folder for "disk"; None = a new folder in memory (/dev/shm), for a server on this machine.
        nccl_address, nccl_port: where this process listens for the server's workers, for "nccl".

    Raises:
        ValueError: an option is invalid.
        SamplerError: the server does not answer, or a package is missing.
    """

    returns_support = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        url: str = "http://127.0.0.1:8000",
        served_model: str | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        retry_seconds: float = 120.0,
        api_key: str | None = None,
        weight_sync: str = "auto",
        weights_dir: str | None = None,
        nccl_address: str = "127.0.0.1",
        nccl_port: int = 51216,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; expected at least 1 request in flight.")
        self.server = ServerClient(url, timeout=timeout, retry_seconds=retry_seconds, api_key=api_key)
        self._sync: WeightSync = make_weight_sync(
            weight_sync, self.server, model, weights_dir=weights_dir, nccl_address=nccl_address, nccl_port=nccl_port
        )
        self._reader = AnswerReader(f"POST {self.server.url}{COMPLETIONS}", _vocab_size(model))
        self._concurrency = concurrency
        self._pool: ThreadPoolExecutor | None = None
        self._logprobs_checked = False
        try:
            self.served_model = served_model or self._listed_model()
            self._sets = KeptSetSource(self.server, self.served_model, self._reader.vocab_size)
            self._versions = WeightVersions(self.server, enabled=weight_sync != "none")
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[Completion]:
        """Draw one completion per prompt, in the order of the prompts.

        Raises:
            ValueError: ``params`` do not fit the prompts, or vLLM would raise a temperature.
            WeightsLostError: the server may have drawn under other weights than those of the last `update_weights`: it was restarted.
            IncompleteSupportError: the server does not report whole sets of kept tokens.
            SamplerError: the server does not answer, or its answer is wrong.
        """
        check_prompts(prompts, params)
        check_generation_options("vllm", params.generation_kwargs)
        for index, temperature in enumerate(params.temperatures):
            if 0 < temperature < MIN_TEMPERATURE:
                raise ValueError(
                    f"temperatures[{index}] is {temperature}; vLLM draws at {MIN_TEMPERATURE} instead. "
                    f"Fix: 0, or at least {MIN_TEMPERATURE}."
                )
        if not prompts:
            return []
        self._sets.ask(prompts[0], params)
        if not self._logprobs_checked:
            self._check_logprobs(prompts[0])
        wanted = params.return_support and params.truncates and not self._sets.masks
        requested = self._sets.logprobs(params) if wanted else None
        pool = self._pool = self._pool or ThreadPoolExecutor(self._concurrency, thread_name_prefix="grpo_fast-vllm")
        futures = [pool.submit(self._complete, index, list(prompt), params, requested) for index, prompt in enumerate(prompts)]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.cancel()  # has no effect unless a request has failed
        wait(futures)
        for future in futures:
            if not future.cancelled() and (error := future.exception()) is not None:
                raise error
        self._versions.check()
        return [future.result() for future in futures]

    def update_weights(self, model: PreTrainedModel | nn.Module, step: int) -> None:
        """Send the model's weights to the server, which then neither draws with older weights nor keeps a prefix cache of them.

        Every process must call it: the first sends the weights, the others take part in gathering sharded ones, and all wait for the end.
        """
        version, same_server = self._versions.begin(model, step)
        if not same_server:
            self._sync.close()  # a server that was restarted is not in the NCCL group
        self._sync.send(model, step)
        self._versions.finish(version)

    def close(self) -> None:
        """Close connections and threads, and remove the folder of the weights. The server keeps running, and keeps its weights.

        The sampler may be used again, which opens what it needs. The folder is removed and the NCCL group left also if nobody calls this:
        when the sampler is collected, or the interpreter ends.
        """
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
        self._sync.close()
        self.server.close()

    def _listed_model(self) -> str:
        answer = self.server.get("/v1/models")
        models = answer.get("data") if isinstance(answer, dict) else None
        first = models[0] if isinstance(models, list) and models else None
        name = first.get("id") if isinstance(first, dict) else None
        if not isinstance(name, str):
            found = reprlib.repr(answer)
            raise SamplerError(f"GET {self.server.url}/v1/models: {found}; expected a list of models. Is this a vLLM server?")
        return name

    def _complete(self, index: int, prompt: list[int], params: SamplingParams, requested: int | None) -> Completion:
        """Draw one completion; ``requested``: log-probabilities of each token, where they are to show its set."""
        temperature, where = float(params.temperatures[index]), f", prompt {index}"
        seed = None if params.seed is None else (params.seed * 1_000_003 + index) % 2**63
        settings = sampling_settings(params, temperature, seed, masks=self._sets.masks)
        size = params.max_new_tokens * BYTES_PER_ID * (16 + (requested or params.top_k or MOST_IDS))
        wanted = params.return_support and params.truncates and temperature > 0
        if wanted and self._sets.masks:
            answer = self.server.post(GENERATE, generate_body(self.served_model, prompt, settings), largest_answer=size)
            return self._reader._replace(source=f"POST {self.server.url}{GENERATE}").generated(answer, prompt, params, where)
        requested = requested if wanted else None
        answer = self.server.post(
            COMPLETIONS, completion_body(self.served_model, prompt, settings, requested or 0), largest_answer=size if wanted else 0
        )
        fix = self._sets.fix(params) if wanted else ""
        return self._reader.completion(answer, prompt, params, temperature, where, requested=requested, fix=fix)

    def _check_logprobs(self, prompt: list[int]) -> None:
        """Check that the server reports log-probabilities of softmax(z/T).

        It requests one position at T = 1 and at T = 2: the difference between two tokens' log-probabilities halves under softmax(z/T), and
        does not change under softmax(z).
        """
        params = SamplingParams(1, [1.0], eos_token_id=0, pad_token_id=0)
        tops = []
        for temperature in (1.0, 2.0):
            settings = sampling_settings(params, temperature, None, masks=self._sets.masks)
            answer = self.server.post(COMPLETIONS, completion_body(self.served_model, prompt, settings, 5))
            tops.append(self._reader.top_logprobs(answer, ""))
        first, second = tops
        shared = sorted((token for token in first if token in second), key=lambda token: first[token])
        fix = f"Fix: restart it with --logprobs-mode processed_logprobs: {START_COMMAND}"
        if any(sum(math.exp(min(value, 1.0)) for value in top.values()) > 1.01 for top in tops):
            raise SamplerError(f"{self.server.url}: what the server reports as log-probabilities are logits. {fix}")
        if len(shared) < 2 or (gap := first[shared[-1]] - first[shared[0]]) < 0.05:
            return  # the distribution is too flat to tell; the next call of `generate` checks again
        ratio = (second[shared[-1]] - second[shared[0]]) / gap
        if abs(ratio - 0.5) > 0.1:
            raise SamplerError(
                f"{self.server.url}: the server reports log-probabilities of softmax(z), not of softmax(z/T), from which it draws (at "
                f"T = 2 the gap between two tokens is {ratio:.2f} of that at T = 1; expected 0.5). "
                f"The ratio would be wrong from the first step. {fix}"
            )
        self._logprobs_checked = True


def _vocab_size(model: PreTrainedModel | nn.Module) -> int | None:
    """The number of tokens in the model's configuration; None if it has none."""
    config = getattr(unwrap(model), "config", None)
    size = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    return size if is_count(size) else None
