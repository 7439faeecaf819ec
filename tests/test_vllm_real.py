"""GRPOTrainer against a real vLLM server, with a real model. `make real-parts` builds both; without them these tests are skipped."""

from __future__ import annotations

import logging
import os
import runpy
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hang import HANG

pytest.importorskip("transformers", reason="the trainer needs transformers")
pytest.importorskip("datasets", reason="the trainer's rows are a dataset")

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TrainerCallback,
)

from grpo_fast.generation import SamplerError, SamplingParams
from grpo_fast.generation.vllm import VLLMSampler
from grpo_fast.tasks import arithmetic_task
from grpo_fast.trainer import GRPOConfig, GRPOTrainer

pytestmark = pytest.mark.sweep

PARTS = runpy.run_path(str(Path(__file__).resolve().parents[1] / "tools" / "real_parts.py"))
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # not all cores
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
}
GAP = 1e-4  # nats between the log-probabilities of the server and the trainer, both in float32
IDLE = 6.0  # seconds; vLLM's HTTP server closes a connection that is idle for 5


def part(name: str) -> Path:
    """The folder of a part, or skip the test."""
    folder = PARTS["find_part"](PARTS[name])
    if folder is None:
        pytest.skip(f"{PARTS[name]} is not in the folder of real parts. Fix: make real-parts")
    assert isinstance(folder, Path)
    return folder


class Server:
    """``vllm serve`` on a free port of this machine, with more of its options if any are given."""

    def __init__(self, model: Path, log: Path, *more: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.process: subprocess.Popen[bytes] | None = None
        options = ["--max-model-len", "512", "--dtype", "float32", "--logprobs-mode", "processed_logprobs", "--enforce-eager", *more]
        self.command = [str(part("SERVER") / "bin" / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *options]

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, env=os.environ | ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + HANG
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        """Stop it and its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(timeout=HANG)

    def weights(self) -> Any:
        """The name of the weights that are in force."""
        return httpx.get(f"{self.url}/weight_info", trust_env=False).json()["weight_version"]


@contextmanager
def serving(model: Path, folder: Path, *options: str) -> Iterator[Server]:
    server = Server(model, folder / "server.log", *options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Pause(TrainerCallback):
    """Waits between two steps, for as long as the server keeps no idle connection."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        time.sleep(IDLE)


def tiny_model(folder: Path, tokenizer: Any, **settings: int) -> Path:
    """A small random model with this tokenizer. The sizes are among those that vLLM computes on a CPU."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(**(sizes | settings), **ends, vocab_size=len(tokenizer), num_hidden_layers=2, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_trainer(model: Path, server: Server, output: Path, **more: Any) -> GRPOTrainer:
    settings = GRPOConfig(
        str(output),
        sampler="vllm",
        sampler_options={"url": server.url, "weight_sync": "disk", "concurrency": 4, "retry_seconds": float(HANG)},
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=3,
        learning_rate=more.pop("learning_rate"),
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    rewards = lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids]  # noqa: E731  (all different: a gradient)
    return GRPOTrainer(str(model), rewards, settings, train_dataset=arithmetic_task(8).rows, **more)


def assert_each_step_was_drawn_from_its_own_weights(run: GRPOTrainer, start: Any) -> None:
    """The gap is small in every step, and would not be if the server still had the weights that the run started with."""
    gaps = [record["sampling/sampling_logp_difference/max"] for record in run.state.log_history if "loss" in record]
    assert len(gaps) == 3 and max(gaps) < GAP
    assert run.rollout is not None
    under_the_first = run.model_forward.logprobs_at(start, run.rollout, run.rollout.temperature)
    assert (under_the_first - run.rollout.tokens["sampler"]).abs().max() > 100 * GAP


def test_training_of_a_pretrained_model(tmp_path: Path) -> None:
    """Three steps of all weights with pauses between them; three of an adapter, merged; and a model that the server does not have."""
    peft = pytest.importorskip("peft", reason="the adapter is one of peft")
    model = part("MODEL")
    start = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with serving(model, tmp_path) as server:
        run = make_trainer(model, server, tmp_path / "full", learning_rate=1e-4, callbacks=[Pause()])
        run.train()
        assert_each_step_was_drawn_from_its_own_weights(run, start)
        assert all(record["step_time/weight_sync"] > 0 for record in run.state.log_history if "loss" in record)

        adapter = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        run = make_trainer(model, server, tmp_path / "lora", learning_rate=2e-3, peft_config=adapter)
        run.train()
        assert_each_step_was_drawn_from_its_own_weights(run, start)

        in_force = server.weights()
        assert in_force.startswith("grpo_fast-2-")
        tokenizer = AutoTokenizer.from_pretrained(model)
        run = make_trainer(tiny_model(tmp_path / "tiny", tokenizer), server, tmp_path / "other", learning_rate=1e-4)
        with pytest.raises(SamplerError, match=r"the server's model has hidden_size = 576, the one that is trained 64; .*Nothing was sent"):
            run.train()
        assert server.weights() == in_force


def test_a_server_that_is_restarted_between_weights_and_completions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes back with the weights that it was started with; the trainer sends the current ones again."""
    model = tiny_model(tmp_path / "tiny", AutoTokenizer.from_pretrained(part("MODEL")))
    start = AutoModelForCausalLM.from_pretrained(model).eval()
    generate, calls = VLLMSampler.generate, iter(range(9))
    with serving(model, tmp_path) as server:

        def restart_first(*arguments: Any) -> Any:
            if next(calls) == 1:
                server.stop()
                server.start()
            return generate(*arguments)

        monkeypatch.setattr(VLLMSampler, "generate", restart_first)
        run = make_trainer(model, server, tmp_path / "out", learning_rate=1e-3)
        with caplog.at_level(logging.WARNING):
            run.train()
        assert_each_step_was_drawn_from_its_own_weights(run, start)
        assert sum("sent again" in record.getMessage() for record in caplog.records) == 1

        other = tiny_model(tmp_path / "wider", AutoTokenizer.from_pretrained(model), intermediate_size=256)
        with pytest.raises(
            SamplerError, match=r"the server's model has gate_up_proj from 64 to 256 features, .* from 64 to 512; .*Nothing"
        ):
            make_trainer(other, server, tmp_path / "other", learning_rate=1e-3).train()


def test_the_server_reports_the_log_probabilities_of_the_penalised_distribution(tmp_path: Path) -> None:
    """With transformers' repetition penalty and the presence penalty by its definition, before the temperature; of few tokens, so that
    they repeat.
    """
    folder = tiny_model(tmp_path / "tiny", AutoTokenizer.from_pretrained(part("MODEL")))
    model, prompt, end, banned, tokens = AutoModelForCausalLM.from_pretrained(folder).eval(), [5, 6, 5, 700], 2, 9, range(5, 45)
    options = {"presence_penalty": 0.4, "logit_bias": {str(banned): -100.0}, "min_tokens": 12, "allowed_token_ids": [end, *tokens]}
    params = SamplingParams(12, [0.7] * 4, seed=1, eos_token_id=end, pad_token_id=0, repetition_penalty=1.6, generation_kwargs=options)
    with serving(folder, tmp_path) as server:
        sampler = VLLMSampler(model, url=server.url, weight_sync="none")
        found = sampler.generate([prompt] * 4, params)
        sampler.close()
    allowed = [token for token in tokens if token != banned]
    without_repetition = 0.0
    for completion in found:
        ids = completion.token_ids
        assert len(ids) == 12 and set(ids) <= set(allowed)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        for position, (row, reported) in enumerate(zip(logits, completion.logprobs or [], strict=True)):
            penalised = RepetitionPenaltyLogitsProcessor(1.6)(torch.tensor([prompt + ids[:position]]), row[None])[0]
            penalised[list(set(ids[:position]))] -= 0.4
            drawn = allowed.index(ids[position])
            assert abs(float((penalised[allowed] / 0.7).log_softmax(-1)[drawn]) - reported) < GAP
            without_repetition = max(without_repetition, abs(float((row[allowed] / 0.7).log_softmax(-1)[drawn]) - reported))
    assert without_repetition > 100 * GAP
