"""The vLLM sampler against a stand-in server on the loopback: its completions, its errors, new weights, and faults of the connection."""

from __future__ import annotations

import gc
import math
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hang import HANG

pytest.importorskip("transformers", reason="the stand-in server is backed by a transformers model")

from vllm_stand_in import SHUTDOWN, TRANSFER, StandIn, serving, vllm_installed

from grpo_fast.generation import Completion, SamplerError, SamplingParams, WeightsLostError, make_sampler, vllm_http
from grpo_fast.generation.merged_weights import merged_state_dict
from grpo_fast.generation.vllm import VLLMSampler
from grpo_fast.generation.vllm_http import ServerClient

EOS, PAD = 1, 0


def tiny(seed: int = 0, *, tied: bool = False, init: float = 0.3, **settings: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(
        **(sizes | settings),
        vocab_size=29,
        max_position_embeddings=64,
        initializer_range=init,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return Qwen2ForCausalLM(config).eval()


def params(temperatures: list[float], **more: Any) -> SamplingParams:
    return SamplingParams(**({"max_new_tokens": 6, "seed": 5} | more), temperatures=temperatures, eos_token_id=EOS, pad_token_id=PAD)


def logprobs_of(model: Any, prompt: list[int], ids: list[int], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)


def rounding_of(model: Any, prompt: list[int], ids: list[int], temperature: float) -> float:
    """How far apart two float32 computations of ``logprobs_of`` may be that add in another order, as decoding with a cache and one whole
    forward do: either rounds every operation on the way to a logit by half of eps, of numbers as large as the logits; the logarithm of
    the sum is rounded once more, of the same size. With the weights of another model the gap is more than a hundred thousand times that.
    """
    with torch.no_grad():
        largest = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits.abs().max().item()
    a_layer = 10  # norm, two products, softmax, product, sum; norm, two products, sum
    operations = a_layer * model.config.num_hidden_layers + 2 + 2  # the last norm and the head; division by the temperature and logsumexp
    return operations * torch.finfo(torch.float32).eps * largest / temperature


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn(tiny())


@pytest.fixture
def url(stand_in: StandIn) -> Iterator[str]:
    with serving(stand_in) as address:
        yield address


def sync_of(sampler: Any) -> Any:
    """The private object that sends the weights to the server."""
    return sampler._sync


def connect(url: str, model: Any = None, **options: Any) -> VLLMSampler:
    defaults: dict[str, Any] = {"retry_seconds": 60.0, "timeout": HANG, "concurrency": 4, "weight_sync": "disk"}
    sampler = make_sampler("vllm", model if model is not None else tiny(), None, url=url, **(defaults | options))
    assert isinstance(sampler, VLLMSampler)
    return sampler


class Wrapper(torch.nn.Module):
    """Wraps a model as DistributedDataParallel does: the model is an attribute, and its parameters have longer names."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


PROMPTS = [[5, 6, 7], [8], [9, 10], [5, 6, 7], [5, 6, 7]]
TEMPERATURES = [0.5, 1.0, 1.7, 0.9, 0.0]


def test_completions_in_order_with_the_logprobs_of_their_own_temperature(stand_in: StandIn, url: str) -> None:
    sampler = connect(url)
    found = sampler.generate(PROMPTS, params(TEMPERATURES))
    for prompt, temperature, completion in zip(PROMPTS, TEMPERATURES, found, strict=True):
        assert completion.finished == (completion.token_ids[-1] == EOS)
        assert len(completion.token_ids) == 6 or completion.finished
        if temperature == 0:
            assert completion.logprobs is None
            continue
        ours = logprobs_of(stand_in.model, prompt, completion.token_ids, temperature)
        bound = rounding_of(stand_in.model, prompt, completion.token_ids, temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), ours, atol=bound, rtol=0)
    assert [c.token_ids for c in sampler.generate(PROMPTS, params(TEMPERATURES))] == [c.token_ids for c in found]  # one seed
    assert [c.token_ids for c in sampler.generate(PROMPTS, params(TEMPERATURES, seed=6))] != [c.token_ids for c in found]
    assert sampler.generate([], params([])) == []
    sampler.close()
    sampler.close()


def test_members_of_a_group_are_drawn_from_different_numbers(url: str) -> None:
    sampler = connect(url)
    group = sampler.generate([[5, 6, 7]] * 8, params([1.5] * 8, max_new_tokens=8))
    assert len({tuple(completion.token_ids) for completion in group}) > 4
    sampler.close()


def test_every_setting_is_sent_so_that_the_servers_defaults_are_not_used(stand_in: StandIn, url: str) -> None:
    sampler = connect(url)
    sampler.generate([[5]], params([0.8], top_p=0.9, top_k=7, min_p=0.01))
    sent = stand_in.requests[-1]
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["min_p"]) == (0.8, 0.9, 7, 0.01)
    assert sent["repetition_penalty"] == 1.0 and sent["presence_penalty"] == sent["frequency_penalty"] == 0.0
    assert sent["ignore_eos"] and sent["stop_token_ids"] == [EOS] and sent["model"] == "stand-in"
    sampler.close()


@pytest.mark.parametrize(("mode", "words"), [("raw_logprobs", r"softmax\(z\)"), ("raw_logits", "logits")])
def test_untempered_logprobs_are_refused(mode: str, words: str) -> None:
    with serving(StandIn(tiny(), logprobs_mode=mode)) as address:
        sampler = connect(address)
        with pytest.raises(SamplerError, match=words) as caught:
            sampler.generate([[5]], params([1.0]))
        assert "--logprobs-mode processed_logprobs" in str(caught.value) and address in str(caught.value)
        sampler.close()


def test_a_flat_distribution_is_checked_again_later() -> None:
    with serving(StandIn(tiny(init=1e-4))) as address:
        sampler = connect(address)
        sampler.generate([[5]], params([1.0]))
        assert not sampler._logprobs_checked
        sampler.close()


@pytest.mark.parametrize("fault", ["500", "cut", "broken"])
def test_temporary_faults_are_retried(stand_in: StandIn, url: str, fault: str) -> None:
    sampler = connect(url)
    expected = sampler.generate(PROMPTS, params(TEMPERATURES))
    stand_in.faults = [fault, fault]
    assert sampler.generate(PROMPTS, params(TEMPERATURES)) == expected
    assert stand_in.faults == []
    sampler.close()


def test_a_server_that_stays_broken_ends_in_an_error_with_url_and_fix(stand_in: StandIn, url: str) -> None:
    sampler = connect(url, retry_seconds=0.4)
    sampler.generate([[5]], params([1.0]))
    stand_in.faults = ["500"] * 1000
    begin = time.monotonic()
    with pytest.raises(SamplerError, match=r"answers 500.*engine says no.*tries") as caught:
        sampler.generate([[5]], params([1.0]))
    assert time.monotonic() - begin < 60  # without waiting for all thousand faults
    assert url in str(caught.value)
    sampler.close()


def test_a_server_that_does_not_answer_raises(stand_in: StandIn, url: str) -> None:
    sampler = connect(url, timeout=0.3, retry_seconds=0.1)
    sampler._logprobs_checked = True
    stand_in.faults = ["hang"] * 5
    with pytest.raises(SamplerError, match=r"no answer within 0\.3 s"):
        sampler.generate([[5]], params([1.0]))
    sampler.close()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("400", "answers 400.*engine says no"),
        ("other prompt", "belongs to another prompt"),
        ("short", "finish_reason 'abort'"),
        ("no logprobs", "log-probability"),
    ],
)
def test_wrong_answers_are_errors_at_once(stand_in: StandIn, url: str, fault: str, words: str) -> None:
    sampler = connect(url)
    sampler.generate([[5]], params([1.0]))
    before = len(stand_in.requests)
    stand_in.faults = [fault]
    with pytest.raises(SamplerError, match=words):
        sampler.generate([[5]], params([1.0]))
    assert len(stand_in.requests) == before + 1
    sampler.close()


def _with(**changes: Any) -> Any:
    """Change values of an answer's choice: the last token, the last log-probability, or a field."""

    def change(content: dict[str, Any]) -> dict[str, Any]:
        choice = content["choices"][0]
        for name, value in changes.items():
            if name == "last_id":
                choice["token_ids"][-1] = value
            elif name == "last_logprob":
                choice["logprobs"]["token_logprobs"][-1] = value
            else:
                choice[name] = value
        return content

    return change


def _more(content: dict[str, Any]) -> dict[str, Any]:
    choice = content["choices"][0]
    choice["token_ids"] = [7] * 9
    choice["logprobs"]["token_logprobs"] = [-1.0] * 9
    return content


def _goes_on(content: dict[str, Any]) -> dict[str, Any]:
    choice = content["choices"][0]
    choice.update(token_ids=[7, EOS, 7, 7, 7, 7], finish_reason="length")
    choice["logprobs"]["token_logprobs"] = [-1.0] * 6
    return content


DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]

HOSTILE: dict[str, tuple[Any, str]] = {
    "negative id": (_with(last_id=-3), r"token_ids\[\d\] is -3; expected a whole number"),
    "fractional id": (_with(last_id=7.0), r"is 7\.0; expected a whole number"),
    "boolean id": (_with(last_id=True), "is True; expected a whole number"),
    "text as id": (_with(last_id="7"), "is '7'; expected a whole number"),
    "null as id": (_with(last_id=None), "is None; expected a whole number"),
    "nested id": (_with(last_id=DEEP), r"token_ids\[\d\] is \[\[.*expected a whole number"),
    "id beyond the vocabulary": (_with(last_id=29), "is 29; expected less than 29, the size of the model's vocabulary"),
    "id beyond 64 bits": (_with(last_id=1 << 70), "expected less than 29"),
    "more tokens": (_more, "has 9 tokens; expected at most max_tokens = 6"),
    "tokens after the end": (_goes_on, "goes on after the end token 1, which is token 2 of 6"),
    "ids as text": (_with(token_ids="abc"), "no token_ids"),
    "ids as object": (_with(token_ids={"0": 1}), "no token_ids"),
    "prompt as text": (_with(prompt_token_ids="5"), "no token_ids"),
    "boolean prompt": (_with(prompt_token_ids=[5.0]), "belongs to another prompt"),
    "-inf": (_with(last_logprob=-math.inf), "log-probability of token . is -inf; expected a finite number"),
    "vLLM's -inf": (_with(last_logprob=-9999.0), r"log-probability of token . is -9999\.0; expected a finite number"),
    "inf": (_with(last_logprob=math.inf), "is inf; expected a finite number"),
    "NaN": (_with(last_logprob=math.nan), "is nan; expected a finite number"),
    "false": (_with(last_logprob=False), "is False; expected a finite number"),
    "text as log-probability": (_with(last_logprob="-1"), "is '-1'; expected a finite number"),
    "null as log-probability": (_with(last_logprob=None), "is None; expected a finite number"),
    "huge integer": (_with(last_logprob=-(10**400)), "expected a finite number"),
    "positive": (_with(last_logprob=0.5), r"is 0\.5; expected a finite number of at most 0"),
    "log-probabilities as list": (_with(logprobs=[1]), "not one log-probability"),
    "log-probabilities as text": (_with(logprobs={"token_logprobs": "abcdef"}), "not one log-probability"),
    "too few log-probabilities": (_with(logprobs={"token_logprobs": []}), "not one log-probability"),
    "no reason": (_with(finish_reason=None), "finish_reason None"),
    "reason as list": (_with(finish_reason=["stop"]), "finish_reason \\['stop'\\]"),
    "null choices": (lambda _: {"choices": None}, "choices are None; expected a list of one"),
    "choices as number": (lambda _: {"choices": 1}, "choices are 1; expected a list of one"),
    "no choice": (lambda _: {"choices": []}, "has 0 choices; expected one"),
    "null choice": (lambda _: {"choices": [None]}, "choice is None; expected an object"),
    "choice as list": (lambda _: {"choices": [[1]]}, r"choice is \[1\]; expected an object"),
    "list": (lambda _: [1], "choices are None"),
    "null": (lambda _: None, "choices are None"),
    "text": (lambda _: "hello", "choices are None"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_no_answer_is_believed(stand_in: StandIn, url: str, case: str) -> None:
    sampler = connect(url)
    sampler._logprobs_checked = True
    change, words = HOSTILE[case]
    stand_in.change = change
    with pytest.raises(SamplerError, match=words) as caught:
        sampler.generate([[5]], params([1.0]))
    assert f"{url}/v1/completions, prompt 0" in str(caught.value)
    assert len(stand_in.requests) == 1  # it is an answer, and not asked for again
    sampler.close()


TOPS: dict[str, tuple[Any, str]] = {
    "null": (None, "no log-probabilities in the answer"),
    "list": ([1], "no log-probabilities in the answer"),
    "no position": ({"top_logprobs": []}, "no log-probabilities in the answer"),
    "null position": ({"top_logprobs": [None]}, "no log-probabilities in the answer"),
    "text": ({"top_logprobs": [{"token_id:5": "-1"}]}, "'token_id:5' is '-1'; expected a number"),
    "false": ({"top_logprobs": [{"token_id:5": False}]}, "'token_id:5' is False; expected a number"),
    "NaN": ({"top_logprobs": [{"token_id:5": math.nan}]}, "'token_id:5' is nan; expected a number"),
    "large logits": ({"top_logprobs": [{"token_id:5": 800.0, "token_id:6": 1.0}]}, "are logits"),
}


@pytest.mark.parametrize("case", TOPS)
def test_no_answer_is_believed_about_the_temperature(stand_in: StandIn, url: str, case: str) -> None:
    sampler = connect(url)
    value, words = TOPS[case]
    stand_in.change = _with(logprobs=value)
    with pytest.raises(SamplerError, match=words):
        sampler.generate([[5]], params([1.0]))
    sampler.close()


@pytest.mark.parametrize("models", ['{"data": [{"id": 5}]}', '{"data": {"id": "a"}}', '{"data": [null]}', "[]", "null", '"a"'])
def test_no_list_of_models_is_believed(models: str) -> None:
    with answering(HEAD % len(models), models.encode()) as address, pytest.raises(SamplerError, match="expected a list of models"):
        connect(address)


@pytest.mark.parametrize("pause", [0.0, 0.05, 0.5])
def test_connections_that_the_server_has_closed_are_not_used(stand_in: StandIn, url: str, tmp_path: Path, pause: float) -> None:
    """The server closes idle connections; new weights, whose requests must not be repeated, and completions come through all the same."""
    sampler = connect(url, weight_sync="disk", weights_dir=str(tmp_path))
    for step in range(3):
        assert len(sampler.generate(PROMPTS, params(TEMPERATURES))) == len(PROMPTS)
        time.sleep(pause)
        sampler.update_weights(tiny(step), step)
        time.sleep(pause)
    assert sum(path == "/collective_rpc" for path in stand_in.calls) == 3
    sampler.close()


@contextmanager
def answering(*parts: bytes, pause: float = 0.0) -> Iterator[str]:
    """A server that answers every request with these bytes, pausing between the parts."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.recv(65536)
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


def test_an_answer_that_trickles_in_has_a_deadline() -> None:
    """Each part comes in time, all of them do not."""
    with answering(HEAD % 1000, *[b" "] * 1000, pause=0.05) as address:
        begin = time.monotonic()
        with pytest.raises(SamplerError, match=r"no answer within 0\.4 s"):
            ServerClient(address, timeout=0.4, retry_seconds=0.0).get("/v1/models")
        assert time.monotonic() - begin < 10  # 1000 parts take 50 s


def test_the_size_of_an_answer_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_http, "LARGEST_ANSWER", 1 << 20)
    with (
        answering(b"HTTP/1.1 200 OK\r\n\r\n", *[b" " * (1 << 18)] * 40) as address,
        pytest.raises(SamplerError, match="larger than 1 MiB"),
    ):
        ServerClient(address, retry_seconds=0.0).get("/v1/models")


@pytest.mark.parametrize("text", [b"[" * 200_000, b"\xff\xfe", b"{"])
def test_what_is_no_json_is_a_named_error(text: bytes) -> None:
    with answering(HEAD % len(text), text) as address, pytest.raises(SamplerError, match="the answer is no JSON"):
        ServerClient(address, retry_seconds=0.0).get("/v1/models")


def test_no_server_at_all() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SamplerError, match=rf"127\.0\.0\.1:{port}/v1/models: connection refused.*vllm serve"):
        connect(f"http://127.0.0.1:{port}", retry_seconds=0.2)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", ""])
def test_bad_url(url: str) -> None:
    with pytest.raises(ValueError, match="expected http://host:port"):
        ServerClient(url)


def test_bad_options(url: str) -> None:
    with pytest.raises(ValueError, match="weight_sync is 'carrier pigeon'"):
        connect(url, weight_sync="carrier pigeon")
    with pytest.raises(ValueError, match="no option colour"):
        connect(url, colour="blue")
    with pytest.raises(SamplerError, match="needs the package vllm"):
        connect(url, weight_sync="nccl")
    sampler = connect(url)
    with pytest.raises(ValueError, match=r"vLLM draws at 0\.01"):
        sampler.generate([[5]], params([0.001]))
    sampler.close()


SECRET, PASSWORD = "sk-9f8e7d6c5b4a", "hunter22"


@pytest.mark.parametrize("where", ["error", "list"])
def test_no_message_has_a_secret(caplog: pytest.LogCaptureFixture, where: str) -> None:
    """The key of the requests and the password of the address, whatever the server repeats of them."""
    text = f'{{"error": "wrong key: {SECRET}"}}'.encode()
    head = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: %d\r\n\r\n" if where == "error" else HEAD
    with answering(head % len(text), text) as address:
        url = address.replace("http://", "http://me:hunter22@")
        with pytest.raises(SamplerError, match=r"<redacted>@127.*<redacted>.*") as caught:
            connect(url, api_key=f"{SECRET}\n", retry_seconds=0.0)
        assert where == "list" or "Fix: the key that the server was started with" in str(caught.value)
    busy = b"HTTP/1.1 503 Busy\r\nContent-Length: %d\r\n\r\n" % len(text)
    with answering(busy, text) as address, pytest.raises(SamplerError, match="answers 503") as waited:
        # Longer than a first answer takes on a busy machine: it waits only if there is time left.
        connect(address.replace("http://", f"http://me:{PASSWORD}@"), api_key=SECRET, retry_seconds=3.0)
    texts = [record.getMessage() for record in caplog.records] + [
        "".join(traceback.format_exception(error)) for error in (caught.value, waited.value)
    ]
    assert any("Waiting for the server" in each for each in texts)
    assert not any(SECRET in each or PASSWORD in each for each in texts)


def test_a_key_that_no_header_can_have_is_refused_without_showing_it() -> None:
    with pytest.raises(ValueError, match="api_key has a character") as caught:
        ServerClient("http://127.0.0.1:1", api_key=f"{SECRET}\nX-Other: 1")
    assert SECRET not in str(caught.value)


# --- new weights -----------------------------------------------------------------------------------------------------------------


def assert_drawn_from(model: Any, completion: Any, *, not_from: Any) -> None:
    """The first completion of PROMPTS, TEMPERATURES has the log-probabilities of the one model, and by far not of the other."""
    drawn, said = completion.token_ids, torch.tensor(completion.logprobs)
    bound = rounding_of(model, PROMPTS[0], drawn, TEMPERATURES[0])
    assert (logprobs_of(model, PROMPTS[0], drawn, TEMPERATURES[0]) - said).abs().max() <= bound
    assert (logprobs_of(not_from, PROMPTS[0], drawn, TEMPERATURES[0]) - said).abs().max() > 1000 * bound


@pytest.mark.parametrize("tied", [False, True])
def test_new_weights_are_in_force_when_update_weights_returns(tmp_path: Path, tied: bool) -> None:
    stand_in = StandIn(tiny(0, tied=tied))
    trained = tiny(1, tied=tied)
    with serving(stand_in) as address:
        sampler = connect(address, trained, weights_dir=str(tmp_path))
        old = sampler.generate(PROMPTS, params(TEMPERATURES))
        sampler.update_weights(trained, 1)
        new = sampler.generate(PROMPTS, params(TEMPERATURES))
        assert [c.token_ids for c in new] != [c.token_ids for c in old]
        assert_drawn_from(trained, new[0], not_from=tiny(0, tied=tied))
        assert stand_in.calls[-2:] == ["/collective_rpc", "/reset_prefix_cache?reset_running_requests=true"]
        sampler.update_weights(trained, 2)
        assert [folder.name for folder in tmp_path.iterdir()] == ["step-2"]  # older checkpoints are removed
        sampler.close()
        assert tmp_path.is_dir()  # a folder that the caller gave is not removed


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_by_vllms_own_transfer(wrapped: bool) -> None:
    """The trainer's side of vLLM's documented protocol: one handshake, then start, update and finish for each step."""
    stand_in = StandIn(tiny(0))
    trained, before = tiny(1), tiny(0)
    model = Wrapper(trained) if wrapped else trained
    with serving(stand_in) as address, vllm_installed(stand_in):
        sampler = connect(address, model, weight_sync="nccl", nccl_address="10.0.0.1", nccl_port=4321)
        for step in (1, 2):
            sampler.update_weights(model, step)
            drawn = sampler.generate(PROMPTS, params(TEMPERATURES))
            assert_drawn_from(trained, drawn[0], not_from=before)
            before.load_state_dict(trained.state_dict())
            with torch.no_grad():
                trained.lm_head.weight.mul_(1.3)
        sampler.close()
    assert stand_in.left and stand_in.calls.pop() == SHUTDOWN and stand_in.phase == ""  # both sides have left the group
    # two workers and this process
    assert stand_in.init_info == {"master_address": "10.0.0.1", "master_port": 4321, "world_size": 3, "rank": 0, "packed": True}
    update = [*TRANSFER[1:], "/reset_prefix_cache?reset_running_requests=true"]
    assert [call for call in stand_in.calls if call != "/v1/models"] == ["/get_world_size", TRANSFER[0], *update, *update]


@pytest.mark.parametrize("versions", [True, False])
def test_a_transfer_connects_again_only_to_a_server_that_was_restarted(versions: bool) -> None:
    """Whether the server can name its weights, or a lost connection is the only sign."""
    stand_in, model = StandIn(tiny(0), versions=versions), tiny(1)
    with serving(stand_in) as address, vllm_installed(stand_in):
        sampler = connect(address, model, weight_sync="nccl")
        for step in range(2):
            sampler.update_weights(model, step)
        assert stand_in.calls.count(TRANSFER[0]) == 1 and SHUTDOWN not in stand_in.calls
        stand_in.restart()
        if not versions:
            sampler.server.lost_connections += 1
        sampler.update_weights(model, 2)
        assert stand_in.calls.count(TRANSFER[0]) == 2
        sampler.close()


def test_a_failed_transfer_is_a_named_error_and_leaves_the_group(stand_in: StandIn, url: str) -> None:
    """The library raises its own types; the group cannot be used again, and a server that hangs in it does not hold up the end."""
    model = tiny(1)
    with vllm_installed(stand_in):
        sampler = connect(url, model, weight_sync="nccl")
        sampler.update_weights(model, 1)
        stand_in.phase = "open"  # of an update that another trainer has begun
        with pytest.raises(
            SamplerError, match=r"'nccl': the weights could not be sent to http.* \(HTTPError: .*500.*--weight-transfer-config"
        ):
            sampler.update_weights(model, 2)
        assert stand_in.left and stand_in.calls[-1] == SHUTDOWN
        sampler.update_weights(model, 3)  # connects again
        assert stand_in.calls.count(TRANSFER[0]) == 2
        stand_in.hangs_at_shutdown = True
        begin = time.monotonic()
        with mock.patch("grpo_fast.generation.vllm_weights.SHUTDOWN_SECONDS", 0.2):
            sampler.close()
        assert time.monotonic() - begin < 10  # the server hangs for 20 s


def test_vllms_own_transfer_is_not_for_adapters_and_not_for_an_older_vllm(url: str, stand_in: StandIn) -> None:
    peft = pytest.importorskip("peft", reason="the adapter is one of peft")
    adapted = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with vllm_installed(stand_in):
        with pytest.raises(ValueError, match=r"an adapter's are not the model's. Fix: weight_sync 'disk'"):
            connect(url, adapted, weight_sync="nccl")
        sampler = connect(url, weight_sync="nccl")
        del sys.modules["vllm.distributed.weight_transfer.nccl_engine"]
        with pytest.raises(SamplerError, match=r"no weight transfer engine for trainers .* Fix: a newer vllm"):
            sampler.update_weights(tiny(1), 1)
        sampler.close()


def test_a_folder_of_its_own_is_removed(url: str) -> None:
    model = tiny(1)
    sampler = connect(url, model)
    sampler.update_weights(model, 1)
    folder = sync_of(sampler)._directory
    assert folder is not None and folder.is_dir()
    sampler.close()
    assert not folder.exists()


def test_weights_are_in_memory_only_until_the_server_has_read_them(
    stand_in: StandIn, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", lambda prefix, dir: str(tmp_path))
    sampler = connect(url)
    sampler.update_weights(tiny(1), 1)
    assert torch.equal(stand_in.model.lm_head.weight, tiny(1).lm_head.weight)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(stand_in, "reload", lambda body: 1 / 0)
    with pytest.raises(SamplerError, match="answers 500"):
        sampler.update_weights(tiny(2), 2)
    assert list(tmp_path.iterdir()) == []  # also after an error
    sampler.close()


def test_a_sampler_that_nobody_closes_removes_its_folder(url: str) -> None:
    sampler = connect(url)
    sampler.update_weights(tiny(1), 1)
    folder = sync_of(sampler)._directory
    assert folder is not None and folder.is_dir()
    remove = sync_of(sampler)._remove
    assert remove is not None and remove.atexit  # when the interpreter ends
    del sampler
    gc.collect()  # and when the sampler is collected
    assert not folder.exists()


def test_a_closed_sampler_opens_again(stand_in: StandIn, url: str) -> None:
    sampler = connect(url)
    before = sampler.generate(PROMPTS, params(TEMPERATURES))
    sampler.update_weights(tiny(0), 1)
    sampler.close()
    assert sampler.generate(PROMPTS, params(TEMPERATURES)) == before
    sampler.update_weights(tiny(1), 2)
    assert sampler.generate(PROMPTS, params(TEMPERATURES)) != before
    sampler.close()


def test_without_the_development_addresses_the_error_says_so() -> None:
    with serving(StandIn(tiny(), dev_mode=False)) as address:
        sampler = connect(address)
        with pytest.raises(SamplerError, match=r"/collective_rpc: the server answers 404.*VLLM_SERVER_DEV_MODE=1"):
            sampler.update_weights(tiny(1), 1)
        sampler.close()


def test_a_failed_reload_is_an_error_and_not_tried_again(stand_in: StandIn, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(body: dict[str, Any]) -> dict[str, Any]:
        raise OSError("no such folder here")

    monkeypatch.setattr(stand_in, "reload", fail)
    sampler = connect(url)
    with pytest.raises(SamplerError, match=r"answers 500.*no such folder here"):
        sampler.update_weights(tiny(1), 1)
    assert stand_in.calls.count("/collective_rpc") == 1
    sampler.close()


def _one_of_two(rank: int, store: str, url: str, folder: str) -> None:
    """One of two: both ask for an update, the first sends it; then one that fails, and both must know."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        sampler = connect(url, weights_dir=folder)
        sampler.update_weights(tiny(1), 1)
        sampler.server.url = sampler.server.url + "/nowhere"
        sampler.server.url += "/nowhere"
        with pytest.raises(SamplerError, match="answers 404"):
            sampler.update_weights(tiny(1), 2)
        sampler.close()
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_update_once_and_fail_together(stand_in: StandIn, url: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    arguments = (str(tmp_path / "store"), url, str(weights))
    # fork: a fresh interpreter would spend most of a minute on imports. It raises what a process raises.
    torch.multiprocessing.start_processes(_one_of_two, arguments, nprocs=2, start_method="fork")
    assert stand_in.calls.count("/collective_rpc") == 1
    assert torch.equal(stand_in.model.lm_head.weight, tiny(1).lm_head.weight)


def test_merged_lora_equals_the_adapted_model_and_leaves_it_alone() -> None:
    peft = pytest.importorskip("peft", reason="merging an adapter needs peft")
    base = tiny(2, tied=True)
    reference = {name: value.clone() for name, value in base.state_dict().items()}
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.5)
    merged = merged_state_dict(model)
    plain = tiny(3, tied=True)
    assert set(merged) == set(plain.state_dict())
    plain.load_state_dict(merged)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours, theirs = plain(input_ids=ids).logits, model(input_ids=ids).logits
        without = tiny(2, tied=True)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (theirs - without).abs().max() > 0.1  # the adapter changes the model
    after = {name.replace(".base_layer.", "."): value for name, value in model.get_base_model().state_dict().items()}
    for name, value in reference.items():
        if name in after:
            assert torch.equal(after[name], value), name


@pytest.mark.slow
def test_a_training_run_draws_each_step_from_the_weights_of_that_step(tmp_path: Path) -> None:
    """GRPOTrainer with the server: in every step the sampler's log-probabilities agree with the trainer's own."""
    pytest.importorskip("datasets", reason="the trainer's rows are a dataset")
    from grpo_fast.data.tasks import sorting_task
    from grpo_fast.data.tasks.sorting import make_tokenizer
    from grpo_fast.demo.model import make_model
    from grpo_fast.trainer import GRPOTrainer
    from grpo_fast.trainer.config import GRPOConfig

    tokenizer = make_tokenizer()
    stand_in = StandIn(make_model(tokenizer).eval())  # other weights than the trainer's, which must not matter
    with serving(stand_in) as address:
        config = GRPOConfig(
            str(tmp_path),
            sampler="vllm",
            sampler_options={"url": address, "weight_sync": "disk", "concurrency": 4},
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=5,
            learning_rate=0.05,
            max_steps=3,
            logging_steps=1,
            temperature_schedule={"kind": "linear", "start": 0.8, "end": 1.4, "steps": 3},
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        torch.manual_seed(7)
        model = make_model(tokenizer)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        rewards = lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions]  # noqa: E731  (all different: a gradient)
        trainer = GRPOTrainer(model, rewards, config, train_dataset=sorting_task(8).rows, processing_class=tokenizer)
        trainer.train()
        assert sync_of(trainer.sampler)._directory is None  # the trainer has closed the sampler
    gaps = [record["sampling/sampling_logp_difference/max"] for record in trainer.state.log_history if "reward" in record]
    assert len(gaps) == 3 and max(gaps) < 1e-4
    assert stand_in.calls.count("/collective_rpc") == 3
    moved = max((now.detach().cpu() - was.cpu()).abs().max().item() for now, was in zip(model.parameters(), before, strict=True))
    assert moved > 0.01  # otherwise older weights would pass too


class Closable:
    """A sampler that counts its calls."""

    def __init__(self) -> None:
        from trainer_cases import Scripted

        self.inner = Scripted()
        self.updates, self.closed = 0, 0

    def generate(self, prompts: Any, params: Any) -> Any:
        return self.inner.generate(prompts, params)

    def update_weights(self, model: Any, step: int) -> None:
        self.updates += 1

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_trainer_closes_the_sampler_that_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    pytest.importorskip("datasets", reason="the trainer's rows are a dataset")
    from trainer_cases import ROWS, odd_tokens, trainer

    from grpo_fast.rewards import RewardError

    sampler = Closable()
    monkeypatch.setattr("grpo_fast.trainer.grpo_trainer.make_sampler", lambda *_, **__: sampler)
    run = trainer(tmp_path, rewards=(lambda completions, **_: 1 / 0) if fails else odd_tokens, eval_dataset=ROWS[:2], eval_rounds=1)
    with pytest.raises(RewardError) if fails else nullcontext():
        run.train()
    assert sampler.closed == 1
    if not fails:
        run.evaluate()
        assert sampler.updates == 2  # a sampler that was closed gets the weights again
        trainer(tmp_path, sampler=sampler).train()
        assert sampler.closed == 1  # a sampler that the caller made is the caller's to close


# --- the check of the sampler's log-probabilities --------------------------------------------------------------------------------------


class Gapped:
    """The log-probabilities of the model that is trained, plus a difference for each call of `generate`."""

    def __init__(self, *differences: float) -> None:
        self.differences = iter(differences)
        self.inner: Any = None

    def generate(self, prompts: Any, params: Any) -> Any:
        difference = next(self.differences)
        return [
            Completion(each.token_ids, each.finished, [value + difference for value in each.logprobs])
            for each in self.inner.generate(prompts, params)
        ]

    def update_weights(self, model: Any, step: int) -> None:
        from grpo_fast.generation.transformers_sampler import TransformersSampler

        self.inner = TransformersSampler(model)

    def close(self) -> None:
        pass


def _dead_until(step: int) -> Any:
    """A reward that is equal for all completions until this rollout, counted from 0."""
    calls = iter(range(1000))
    return lambda completion_ids, **_: [float(sum(ids) % 7) if call >= step else 1.0 for call in [next(calls)] for ids in completion_ids]


def test_groups_without_advantage_do_not_pass_the_sampler_check(tmp_path: Path) -> None:
    from trainer_cases import trainer

    with pytest.raises(SamplerError, match=r"differ from ours .* Nothing was trained.*sampler_tolerance = 0\.02"):
        trainer(tmp_path, rewards=_dead_until(9), sampler=Gapped(0.5)).train()


def test_a_check_without_tokens_is_not_done(tmp_path: Path) -> None:
    """The sampler knows no log-probabilities in the first step, and wrong ones in the second."""
    from trainer_cases import trainer

    class Silent(Gapped):
        def generate(self, prompts: Any, params: Any) -> Any:
            first = not hasattr(self, "seen")
            self.seen = True
            found = super().generate(prompts, params)
            return [Completion(each.token_ids, each.finished, None) for each in found] if first else found

    run = trainer(tmp_path, rewards=_dead_until(0), sampler=Silent(0.5, 0.5), max_steps=2)
    with pytest.raises(SamplerError, match="Nothing was trained"):
        run.train()
    assert run.state.global_step == 1


def test_every_rollout_is_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning, and the end after as many rollouts in a row as the patience says; a good rollout starts the count again."""
    from trainer_cases import trainer

    run = trainer(tmp_path, rewards=_dead_until(0), sampler=Gapped(0, 0.5, 0.5, 0, 0.5, 0.5, 0.5), max_steps=9)
    with pytest.raises(SamplerError, match=r"Step 7: .* by 0\.5 nats .* in 3 rollouts in a row \(sampler_tolerance_patience\)"):
        run.train()
    assert run.state.global_step == 6
    warnings = [record.getMessage() for record in caplog.records if "differ from ours" in record.getMessage()]
    assert len(warnings) == 1 and warnings[0].startswith("Step 2: the sampler's log-probabilities differ from ours by 0.5 nats a token")


def test_the_patience_is_a_setting(tmp_path: Path) -> None:
    from trainer_cases import config, trainer

    run = trainer(tmp_path, rewards=_dead_until(0), sampler=Gapped(0, 0.5), max_steps=9, sampler_tolerance_patience=1)
    with pytest.raises(SamplerError, match="Step 2: "):
        run.train()
    with pytest.raises(ValueError, match="sampler_tolerance_patience is 0; expected a whole number of at least 1"):
        config(tmp_path, sampler_tolerance_patience=0)


# --- a server that loses its weights ---------------------------------------------------------------------------------------------------


def test_a_server_that_was_restarted_is_noticed(stand_in: StandIn, url: str) -> None:
    sampler = connect(url)
    sampler.generate(PROMPTS, params(TEMPERATURES))  # before any weights were sent there are none to lose
    sampler.update_weights(tiny(1), 1)
    sampler.generate(PROMPTS, params(TEMPERATURES))
    stand_in.restart()
    with pytest.raises(WeightsLostError, match=r"has the weights 'default'; expected 'grpo_fast-1-.*not used"):
        sampler.generate(PROMPTS, params(TEMPERATURES))
    sampler.update_weights(tiny(1), 1)
    assert_drawn_from(tiny(1), sampler.generate(PROMPTS, params(TEMPERATURES))[0], not_from=tiny(0))
    stand_in.weight_version = "of another trainer"
    with pytest.raises(WeightsLostError, match="'of another trainer'"):
        sampler.generate(PROMPTS, params(TEMPERATURES))
    sampler.close()


def test_a_restart_while_weights_are_sent_is_noticed(stand_in: StandIn, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it happens before the server has read the weights or after: their name is lost with it."""
    sampler = connect(url)
    reload = stand_in.reload

    def restart_then_reload(body: Any) -> Any:
        stand_in.restart()
        return reload(body)

    def reload_then_restart(body: Any) -> Any:
        answer = reload(body)
        stand_in.restart()
        return answer

    monkeypatch.setattr(stand_in, "reload", restart_then_reload)
    sampler.update_weights(tiny(1), 1)
    with pytest.raises(WeightsLostError):
        sampler.generate(PROMPTS, params(TEMPERATURES))
    monkeypatch.setattr(stand_in, "reload", reload_then_restart)
    sampler.update_weights(tiny(1), 1)
    with pytest.raises(WeightsLostError):
        sampler.generate(PROMPTS, params(TEMPERATURES))
    sampler.close()


def test_without_names_a_lost_connection_counts_as_a_restart() -> None:
    stand_in = StandIn(tiny(), versions=False)
    with serving(stand_in) as address:
        sampler = connect(address)
        sampler.update_weights(tiny(1), 1)
        sampler.generate(PROMPTS, params(TEMPERATURES))
        stand_in.faults = ["closed"]  # an idle connection
        sampler.generate(PROMPTS, params(TEMPERATURES))
        stand_in.faults = ["broken"]
        with pytest.raises(WeightsLostError, match="a connection was lost since the weights were sent"):
            sampler.generate(PROMPTS, params(TEMPERATURES))
        sampler.update_weights(tiny(1), 1)
        sampler.generate(PROMPTS, params(TEMPERATURES))
        sampler.close()


def test_weights_whose_connection_broke_are_sent_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server that is restarted while it gets the weights of the second step, and a sampler without a trainer."""
    from trainer_cases import model, trainer

    stand_in = StandIn(model(3).eval())
    with serving(stand_in) as address:
        rewards, calls = _dead_until(0), iter(range(9))

        def reward(completion_ids: Any, **columns: Any) -> Any:
            stand_in.breaks = int(next(calls) == 0)
            return rewards(completion_ids, **columns)

        options = {"url": address, "weight_sync": "disk", "concurrency": 4}
        settings: dict[str, Any] = {"use_vllm": True, "vllm_server_base_url": address, "sampler_options": options}
        run = trainer(tmp_path, rewards=reward, max_steps=2, learning_rate=0.05, **settings)
        run.train()
        sampler = connect(address, model(3))
        stand_in.breaks = 1
        with pytest.raises(WeightsLostError, match="/collective_rpc: the connection broke"):
            sampler.update_weights(model(3), 1)
        sampler.close()
    gaps = [record["sampling/sampling_logp_difference/max"] for record in run.state.log_history if "loss" in record]
    assert len(gaps) == 2 and max(gaps) < 1e-4
    assert sum("sent again" in record.getMessage() for record in caplog.records) == 1


def test_a_prefix_cache_of_older_weights_is_an_error(stand_in: StandIn, url: str) -> None:
    sampler = connect(url)
    stand_in.forgets = False
    with pytest.raises(SamplerError, match="keeps its prefix cache, which belongs to older weights"):
        sampler.update_weights(tiny(1), 1)
    sampler.close()


@pytest.mark.parametrize("versions", [True, False])
def test_the_trainer_sends_lost_weights_again(tmp_path: Path, versions: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A server that is restarted in the middle of the second rollout: every step is trained on completions of its own weights."""
    from trainer_cases import model, trainer

    stand_in = StandIn(model(3).eval(), versions=versions)
    with serving(stand_in) as address:
        stand_in.restart_at = 2 + 16 + 7  # two requests check the temperature, and a rollout has 16
        if not versions:
            stand_in.faults = [""] * (stand_in.restart_at - 1) + ["broken"]
        options = {"url": address, "weight_sync": "disk", "concurrency": 4}
        run = trainer(
            tmp_path,
            rewards=_dead_until(0),
            sampler_options=options,
            use_vllm=True,
            vllm_server_base_url=address,
            max_steps=3,
            learning_rate=0.05,
            sampler_tolerance=1e-3,
        )
        run.train()
    gaps = [record["sampling/sampling_logp_difference/max"] for record in run.state.log_history if "loss" in record]
    assert len(gaps) == 3 and max(gaps) < 1e-4
    assert stand_in.calls.count("/collective_rpc") == 4
    assert sum("sent again" in record.getMessage() for record in caplog.records) == 1
    assert all(record["step_time/weight_sync"] > 0 for record in run.state.log_history if "loss" in record)


def test_a_model_of_other_sizes_is_refused_before_weights_are_sent(stand_in: StandIn, url: str) -> None:
    for name, value in (("vocab_size", 31), ("hidden_size", 32), ("num_hidden_layers", 3)):
        other = tiny()
        setattr(other.config, name, value)
        sampler = connect(url, other)
        with pytest.raises(SamplerError, match=rf"server's model has {name} = \d+, the one that is trained {value}; .*Nothing was sent"):
            sampler.update_weights(other, 1)
        sampler.close()
    assert "/collective_rpc" not in stand_in.calls


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"intermediate_size": 32}, "gate_up_proj from 16 to 48 features, the one that is trained from 16 to 64"),
        ({"num_key_value_heads": 2}, "qkv_proj from 16 to 32 features, the one that is trained from 16 to 48"),
    ],
    ids=str,
)
def test_a_model_of_other_layers_is_refused_before_weights_are_sent(
    stand_in: StandIn, url: str, settings: dict[str, Any], words: str
) -> None:
    """vLLM 0.32 on a CPU answers {"results": [null]} to weights that do not fit, and has then loaded a part of them."""
    peft = pytest.importorskip("peft", reason="a model with an adapter is one of peft")
    other = tiny(**settings)
    adapter = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    for model in (other, peft.get_peft_model(other, adapter)):
        sampler = connect(url, model)
        with pytest.raises(SamplerError, match=f"server's model has {words}; .*Nothing was sent"):
            sampler.update_weights(model, 1)
        sampler.close()
    assert "/collective_rpc" not in stand_in.calls
    same = peft.get_peft_model(tiny(1), adapter)
    sampler = connect(url, same)
    sampler.update_weights(same, 1)
    sampler.close()


def test_a_head_that_a_cpu_server_does_not_replace_is_refused(stand_in: StandIn, url: str) -> None:
    """vLLM 0.32 on a CPU goes on with the old head if it is tied, and answers success. An embedding that is not trained is no problem."""
    tied, frozen = tiny(1, tied=True), tiny(1, tied=True)
    frozen.get_input_embeddings().weight.requires_grad_(False)
    sampler = connect(url, tied)
    sampler.update_weights(tied, 1)  # on a GPU
    sampler.close()
    stand_in.on_cpu = True
    for version in ("0.32.0", "0.31.1.dev3+gabc", "unknown"):
        stand_in.version = version
        sampler = connect(url, tied)
        with pytest.raises(SamplerError, match=r"copy of the LM head, which new weights do not replace .*Nothing was sent"):
            sampler.update_weights(tied, 1)
        for model in (tiny(1), frozen):
            sampler = connect(url, model)
            sampler.update_weights(model, 1)
            sampler.close()
    stand_in.version = "0.33.0"
    connect(url, tied).update_weights(tied, 1)


def test_a_client_that_waits_says_so(stand_in: StandIn, url: str, caplog: pytest.LogCaptureFixture) -> None:
    sampler = connect(url)
    sampler.generate([[5]], params([1.0]))
    assert caplog.records == []
    stand_in.faults = ["500"] * 4
    sampler.generate([[5]], params([1.0]))
    said = [record.getMessage() for record in caplog.records if "Waiting" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(f"{url}: the server answers 500: ")
    assert re.search(r"engine says no.*Waiting for the server, for up to \d\d s more \(retry_seconds\)\.$", said[0])
    sampler.close()


# --- truncated sampling ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [{"top_p": 0.97}, {"top_k": 20}, {"min_p": 0.05}], ids=str)
def test_truncation_has_weights_per_token(tmp_path: Path, cut: dict[str, Any]) -> None:
    from trainer_cases import config, trainer

    assert config(tmp_path).vllm_importance_sampling_mode == "sequence_mask"
    assert config(tmp_path, use_vllm=True, **cut).vllm_importance_sampling_mode == "token_mask"
    for mode in ("sequence_mask", "sequence_truncate"):
        refused = rf"vllm_importance_sampling_mode is '{mode}'; expected a mode per token .*1\.7e-7.*Fix: 'token_mask'"
        for switch in ("use_vllm", "use_transformers_continuous_batching"):
            with pytest.raises(ValueError, match=refused):
                config(tmp_path, **{switch: True}, vllm_importance_sampling_mode=mode, replay_support=False, **cut)
            config(tmp_path, **{switch: True}, vllm_importance_sampling_mode=mode, **cut)  # the sets are replayed
        with pytest.raises(ValueError, match=refused):
            correction = {"vllm_importance_sampling_correction": True, "replay_support": False}
            config(tmp_path, vllm_importance_sampling_mode=mode, **correction, **cut)
        with pytest.raises(ValueError, match=refused):  # a sampler of which the settings do not know
            trainer(tmp_path, sampler=Gapped(), vllm_importance_sampling_mode=mode, **cut)
        config(tmp_path, use_vllm=True, vllm_importance_sampling_correction=False, vllm_importance_sampling_mode=mode, **cut)
        config(tmp_path, vllm_importance_sampling_mode=mode, **cut)  # the trainer's own model, which is not corrected
        config(tmp_path, use_vllm=True, vllm_importance_sampling_mode=mode)  # no truncation


def test_truncated_sampling_with_vllm_learns_without_replay(tmp_path: Path) -> None:
    """The mean weight is the probability of the kept tokens, and not its product over a sequence."""
    from trainer_cases import model, trainer

    with serving(StandIn(model().eval())) as address:
        options = {"url": address, "weight_sync": "disk", "concurrency": 4}
        settings = {"use_vllm": True, "sampler_options": options, "vllm_server_base_url": address}
        run = trainer(tmp_path, rewards=_dead_until(0), top_p=0.6, replay_support=False, **settings)
        run.train()
    assert run.rollout is not None
    weights = run.rollout.tokens["weights"]
    kept = (run.rollout.tokens["sampler"] != 0) & (weights != 0)
    assert 0.4 < weights[kept].mean() < 1 and weights[kept].min() > 0.1


# --- the command line ------------------------------------------------------------------------------------------------------------------


def test_a_gap_at_the_first_step_is_one_sentence_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The difference looks like that of a server in another precision."""
    from trainer_cases import ROWS, TOKENIZER, config, model

    from grpo_fast.cli.train import PreparedTraining, run

    monkeypatch.setattr("grpo_fast.trainer.grpo_trainer.make_sampler", lambda *_, **__: Gapped(0.045))
    arguments = {"model": model(), "reward_funcs": _dead_until(0), "args": config(tmp_path), "train_dataset": ROWS}
    with pytest.raises(SystemExit) as caught:
        run(PreparedTraining(arguments | {"processing_class": TOKENIZER}, None, {}))
    said = capsys.readouterr().err
    assert caught.value.code == 1 and "Traceback" not in said
    assert all(fix in said for fix in ("Nothing was trained", "--dtype float32", "--bf16", "sampler_tolerance"))
