"""Rollouts by a vLLM server: ``vllm serve`` on other GPUs or another machine, spoken to by HTTP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from grpo_fast.generation.protocol import Completion, SamplerError, SamplingParams, check_prompts, end_tokens
from grpo_fast.generation.vllm_http import Server
from grpo_fast.generation.vllm_weights import WeightSync, make_weight_sync

__all__ = ["VLLMSampler"]

START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"
COLDEST = 0.01  # vLLM raises a lower temperature to this one, other than 0


class VLLMSampler:
    """Client of a vLLM server.

    It is started like this; the variable opens the addresses by which weights are replaced::

        VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs

    Each completion is a request of its own, with its own temperature and seed: in one request with a seed all members of a group would be
    drawn from the same random numbers. The server shares the work on equal prompts by its prefix cache. The server's own defaults
    (generation_config.json) play no part, and its end tokens are those of the params.

    By default vLLM reports log-probabilities of softmax(z), whatever the temperature; a ratio against those is wrong from the first step.
    So the first rollout asks for one token at two temperatures, and refuses a server whose answers do not depend on it.

    Args:
        model: the causal language model that is trained, for `update_weights`.
        url: where the server listens.
        served_model: the name it serves the model under; None = the first that it lists.
        concurrency: requests in flight.
        timeout: seconds one completion may take.
        retry_seconds: how long a request is tried again while the server is down, overloaded, or answers with a torn text.
        api_key: None = the environment variable VLLM_API_KEY, if set.
        weight_sync: "nccl" (from GPU to GPU; needs vllm installed here too, and ``--weight-transfer-config '{"backend": "nccl"}'`` there),
            "disk" (a folder both sides see), "none" (the server keeps its weights: for evaluation), or "auto": nccl where the model is on
            a GPU and vllm is installed, else disk.
        weights_dir: folder for "disk"; None = one of its own in memory (/dev/shm), for a server on this machine.
        nccl_address, nccl_port: where this process listens for the server's workers, for "nccl".
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
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
        self.server = Server(url, timeout=timeout, retry_seconds=retry_seconds, api_key=api_key)
        self._sync: WeightSync = make_weight_sync(
            weight_sync, self.server, model, weights_dir=weights_dir, nccl_address=nccl_address, nccl_port=nccl_port
        )
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="grpo_fast-vllm")
        self._processed = False
        try:
            self.served_model = served_model or self._listed_model()
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[Completion]:
        """One completion for each prompt, in their order. Empty list: empty list."""
        check_prompts(prompts, params)
        for index, temperature in enumerate(params.temperatures):
            if 0 < temperature < COLDEST:
                raise ValueError(
                    f"temperatures[{index}] is {temperature}; vLLM draws at {COLDEST} instead. Cure: 0, or at least {COLDEST}."
                )
        if not prompts:
            return []
        if not self._processed:
            self._check_logprobs(prompts[0])
        futures = [self._pool.submit(self._complete, index, list(prompt), params) for index, prompt in enumerate(prompts)]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.cancel()  # nothing, unless one has failed
        wait(futures)
        for future in futures:
            if not future.cancelled() and (error := future.exception()) is not None:
                raise error
        return [future.result() for future in futures]

    def update_weights(self, model: Any, step: int) -> None:
        """Put the model's weights into the server. When this returns, no completion is drawn, and no prefix cached, from older ones.

        With several processes all call it: the first sends, the others help to gather what is sharded, and all wait.
        """
        self._sync.send(model, step)

    def close(self) -> None:
        """Let go of connections, threads and the weights' folder. The server goes on."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._sync.close()
        self.server.close()

    def _listed_model(self) -> str:
        answer = self.server.get("/v1/models")
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise SamplerError(f"GET {self.server.url}/v1/models: {answer!r}; expected a list of models. Is this a vLLM server?") from None

    def _request(self, prompt: list[int], params: SamplingParams, temperature: float, **more: Any) -> dict[str, Any]:
        """Everything is said, for what is left open the server fills in from the model's generation_config.json."""
        return {
            "model": self.served_model,
            "prompt": prompt,
            "n": 1,
            "temperature": temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": params.max_new_tokens,
            "min_tokens": 0,
            "ignore_eos": True,  # the end tokens are these, whatever the server takes for one
            "stop_token_ids": end_tokens(params),
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        } | more

    def _complete(self, index: int, prompt: list[int], params: SamplingParams) -> Completion:
        temperature = float(params.temperatures[index])
        seed = {} if params.seed is None else {"seed": (params.seed * 1_000_003 + index) % 2**63}
        answer = self.server.post("/v1/completions", self._request(prompt, params, temperature, **seed))
        return self._read(answer, index, prompt, params, temperature)

    def _read(self, answer: Any, index: int, prompt: list[int], params: SamplingParams, temperature: float) -> Completion:
        def wrong(what: str, cure: str) -> SamplerError:
            return SamplerError(f"POST {self.server.url}/v1/completions, prompt {index}: {what}. {cure}")

        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != 1:
            raise wrong(f"the answer has {len(choices or [])} choices; expected one", "Is this a vLLM server?")
        choice = choices[0]
        ids, echoed, reason = choice.get("token_ids"), choice.get("prompt_token_ids"), choice.get("finish_reason")
        if not isinstance(ids, list) or not isinstance(echoed, list):
            raise wrong("the answer has no token_ids", "Cure: a newer vLLM, which knows return_token_ids.")
        if echoed != prompt:
            raise wrong(
                f"the answer belongs to another prompt ({len(echoed)} tokens, {len(prompt)} were sent)",
                "Something between here and the server mixes answers up; connect to it directly.",
            )
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(logprobs, list) or len(logprobs) != len(ids) or not all(_is_logprob(value) for value in logprobs):
            raise wrong(f"there is not one log-probability for each of the {len(ids)} tokens", f"Cure: {START}")
        ended = bool(ids) and ids[-1] in end_tokens(params)
        if reason not in ("stop", "length") or ended != (reason == "stop") or (not ended and len(ids) != params.max_new_tokens):
            raise wrong(
                f"a completion of {len(ids)} tokens ended with finish_reason {reason!r}; expected an end token, or "
                f"{params.max_new_tokens} tokens",
                "The answer was cut: by the server's --max-model-len, or because it was paused. Raise the one, or wait for the other.",
            )
        return Completion(ids, ended, [float(value) for value in logprobs] if temperature > 0 else None)

    def _check_logprobs(self, prompt: list[int]) -> None:
        """One position at T = 1 and 2: between two tokens the gap halves under softmax(z/T), and stays what it was under softmax(z)."""
        params = SamplingParams(1, [1.0], eos_token_id=0, pad_token_id=0)
        tops = []
        for temperature in (1.0, 2.0):
            answer = self.server.post("/v1/completions", self._request(list(prompt), params, temperature, logprobs=5))
            try:
                tops.append(answer["choices"][0]["logprobs"]["top_logprobs"][0])
            except (KeyError, IndexError, TypeError):
                raise SamplerError(f"POST {self.server.url}/v1/completions: no log-probabilities in the answer. Cure: {START}") from None
        first, second = tops
        shared = sorted((token for token in first if token in second), key=lambda token: first[token])
        cure = f"Cure: restart it with --logprobs-mode processed_logprobs: {START}"
        if any(sum(map(math.exp, map(float, top.values()))) > 1.01 for top in tops):
            raise SamplerError(f"{self.server.url}: what the server reports as log-probabilities are logits. {cure}")
        if len(shared) < 2 or (gap := first[shared[-1]] - first[shared[0]]) < 0.05:
            return  # too flat to tell here; the next rollout asks again
        ratio = (second[shared[-1]] - second[shared[0]]) / gap
        if abs(ratio - 0.5) > 0.1:
            raise SamplerError(
                f"{self.server.url}: the server reports log-probabilities of softmax(z), not of softmax(z/T), from which it draws (at "
                f"T = 2 the gap between two tokens is {ratio:.2f} of that at T = 1; expected 0.5). "
                f"The ratio would be wrong from the first step. {cure}"
            )
        self._processed = True


def _is_logprob(value: Any) -> bool:
    return isinstance(value, (int, float)) and not math.isnan(value) and value < 1e-3
