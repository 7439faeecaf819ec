"""A trainer in its process, whose training loop runs one step at a time, on request."""

from __future__ import annotations

import functools
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from grpo_fast.benchmark.harness.measure import Record, measure, trim
from grpo_fast.benchmark.step.inputs import rare_token

__all__ = ["PHASES", "STEPS", "StepCase", "StepWorker"]

PHASES = ("generation", "loss", "backward", "optimizer", "other")
STEPS = 100_000  # more than are ever run
_ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """What a trainer is made of: the model's folder, prompts that have the same number of tokens, and sizes."""

    model: Path
    prompts: tuple[str, ...]
    groups: int  # of a step
    generations: int  # completions of a group
    completion: int  # tokens of a completion
    lora: bool
    threads: int


class _StepByStep(TrainerCallback):
    """Stops the training loop after each step, and takes the time of the optimizer."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.go, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.seconds, self.started = seconds, 0.0
        self.logs: dict[str, float] = {}

    def _stop(self) -> None:
        self.stopped.release()
        self.go.acquire()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._stop()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seconds["optimizer"] += time.perf_counter() - self.started

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:  # once for each step; the training loop also logs when it ends
            self.logs = dict(logs)
            self._stop()


class StepWorker:
    """TRL's trainer ("stock") or this package's ("ours"), with their defaults, in float32.

    The training loop runs in a thread. `repetition` lets it run from the end of a step to the end of the next.
    """

    def __init__(self, name: str, case: StepCase) -> None:
        self.name, self.case = name, case
        self.active = 1.0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.loop = _StepByStep(self.seconds)
        self.folder = tempfile.TemporaryDirectory()
        self.trainer = self._make_trainer()
        self._take_time()
        self.error: BaseException | None = None
        threading.Thread(target=self._train, daemon=True).start()
        self.loop.stopped.acquire()

    def repetition(self, active: float) -> Record:
        """One step, in which the completions of this share of the groups have unequal rewards.

        Returns:
            The seconds of the step and of its phases, the resident memory at its worst moment ("resident_peak") and how far that was above
            what was resident before ("peak_bytes"), and the loss.

        Raises:
            RuntimeError: the trainer has done other work than was asked for.
        """
        self.active = active
        expected = {"frac_reward_zero_std": 1 - active, "completions/mean_length": float(self.case.completion)}
        for _ in range(_ATTEMPTS):  # a random model samples every token now and then, the one that ends a completion too
            self.seconds.update(dict.fromkeys(PHASES, 0.0))
            measured = measure(self._step, self.case.threads, cpu_clock=time.process_time_ns)
            logs = self.loop.logs
            done = {key: logs.get(key) for key in expected}
            if done == expected:
                break
        else:
            raise RuntimeError(f"{self.name} logged {done}; expected {expected}. Its work is not that of the others.")
        wall = measured.wall_ms / 1e3
        self.seconds["other"] = wall - sum(self.seconds.values())
        memory = {"peak_bytes": measured.peak_bytes, "resident_peak": measured.resident_peak}
        trim()  # the other trainer needs the memory
        return {"seconds": measured.seconds, "phases": dict(self.seconds), "wall_seconds": wall, **memory, "loss": logs["loss"]}

    def _make_trainer(self) -> Any:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer

        case = self.case
        model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
        # All completions shall have the same number of tokens, so a token that is hardly ever sampled ends them.
        tokenizer = AutoTokenizer.from_pretrained(case.model)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(rare_token(tokenizer))
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        arguments: dict[str, Any] = {
            "output_dir": self.folder.name,
            "num_generations": case.generations,
            "per_device_train_batch_size": case.groups * case.generations,
            "max_completion_length": case.completion,
            "max_steps": STEPS,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "log_level": "error",
        }
        options: dict[str, Any] = {}
        if case.lora:
            from peft import LoraConfig

            options["peft_config"] = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        if self.name == "stock":
            from trl import GRPOConfig, GRPOTrainer
        else:
            from grpo_fast.trainer import GRPOConfig, GRPOTrainer
        rows = Dataset.from_list([{"prompt": prompt} for prompt in case.prompts])
        return GRPOTrainer(
            model=model,
            reward_funcs=self._rewards,
            args=GRPOConfig(**arguments),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[self.loop],
            **options,
        )

    def _rewards(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        """1 and 0 in turn in the first groups, 0 in the others, whatever the completions are."""
        alive = round(self.active * self.case.groups) * self.case.generations
        return [float(index < alive and index % 2) for index in range(len(completions))]

    def _take_time(self) -> None:
        """Measure the phases where both trainers have them."""
        owner, method = (self.trainer, "_generate_single_turn") if self.name == "stock" else (self.trainer.sampler, "generate")
        for phase, where, name in (
            ("generation", owner, method),
            ("loss", self.trainer, "compute_loss"),
            ("backward", self.trainer.accelerator, "backward"),
        ):
            setattr(where, name, self._timed(phase, getattr(where, name)))

    def _timed(self, phase: str, function: Any) -> Any:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[phase] += time.perf_counter() - started

        return timed

    def _train(self) -> None:
        torch.set_num_threads(self.case.threads)  # a new thread starts with as many as there are cores
        try:
            self.trainer.train()
            self.error = RuntimeError(f"the training loop ended; expected {STEPS} steps")
        except BaseException as error:
            self.error = error
        finally:
            self.loop.stopped.release()

    def _step(self) -> None:
        if self.error is None:
            self.loop.go.release()
            self.loop.stopped.acquire()
        if self.error is not None:
            raise self.error
