"""One training of a training study: a causal language model trained by `GRPOTrainer`, and evaluated before and after."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from grpo_fast.study.model_training import ModelTraining
from grpo_fast.study.result_files import JSONObject
from grpo_fast.study.training_study import BEFORE, TrainingStudy
from grpo_fast.trainer.config import GRPOConfig
from grpo_fast.trainer.grpo_trainer import GRPOTrainer
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.utils.text_statistics import distinct_shares, repeated_ngrams

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["evaluate_policy", "model_run"]

FULL_MARKS = 1.0 - 1e-6
SHOWN_ROWS = 6  # rows whose first completion at each temperature is kept, to be shown
CURVES = {  # learning curve -> key in the trainer's log; a key that a training does not log gives no curve
    "entropy": "entropy",
    "zero_std": "frac_reward_zero_std",
    "distinct": "completions/distinct",
    "temperature": "temperature",
    "length": "completions/mean_length",
    "grad_norm": "grad_norm",
    "gap": "sampling/sampling_logp_difference/mean",
    "kept_mass": "sampling/kept_mass",
    "set_size": "sampling/set_size",
}
OFF_BY = 0.1  # a ratio outside of 1 - OFF_BY to 1 + OFF_BY counts as off


class MeasuredTrainer(GRPOTrainer):
    """Measures the ratios of the first step that has tokens in the loss: the probability of each token under the policy of the loss,
    divided by that under which it was sampled. They are 1 if both policies are the same.
    """

    first_step: dict[str, float] | None = None

    def check_step(self) -> None:
        if self.first_step is None:
            pairs = [
                (out.logprobs, batch.rows.tokens["sampler"], out.active) for out, batch in self._losses if "sampler" in batch.rows.tokens
            ]
            ratios = [(own.detach() - sampled).double().exp()[active] for own, sampled, active in pairs]
            if sum(ratio.numel() for ratio in ratios):
                ratio = torch.cat(ratios).cpu()
                self.first_step = {
                    "ratio_mean": float(ratio.mean()),
                    "ratio_std": float(ratio.std(correction=0)),
                    "ratio_off": float(((ratio - 1).abs() > OFF_BY).double().mean()),
                    "tokens": ratio.numel(),
                }
        super().check_step()


def model_run(study: TrainingStudy, seed: int, label: str, on_step: Callable[[int, str, int], None]) -> JSONObject:
    """Make one run from the model's own weights.

    Args:
        study: of a model, see `prepare_model_training`.
        seed: of data, sampling and adapter.
        label: of the training; BEFORE evaluates the model without training.
        on_step: called with seed, label and 0 at the beginning, and 1 after each step.

    Returns:
        ``seed``, ``trained_at`` (the label), ``seconds``, ``cpu_seconds``, ``curves`` (one number per step; empty for BEFORE),
        ``first_step`` (see `MeasuredTrainer`; None for BEFORE) and ``table``, see `evaluate_policy`.
    """
    model = study.subject
    assert isinstance(model, ModelTraining)
    on_step(seed, label, 0)
    began, cpu = time.perf_counter(), time.process_time()
    parts, curves = model.parts, dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as folder:
        trainer = MeasuredTrainer(
            str(model.options.model),
            parts.rewards,
            _config(study, model, seed, label, folder),
            train_dataset=parts.train_dataset,
            processing_class=parts.tokenizer,
            peft_config=parts.peft_config,
            callbacks=[_Progress(seed, label, on_step)],
        )
        if label != BEFORE:
            trainer.train()
            logs = [log for log in trainer.state.log_history if "loss" in log]
            keys = {"accuracy": f"rewards/{parts.runner.names[model.correct]}/mean"} | CURVES
            curves = {name: [float(log[key]) for log in logs] for name, key in keys.items() if all(key in log for log in logs)}
        assert parts.eval_dataset is not None
        rows = [dict(row) for row in parts.eval_dataset]
        table = [evaluate_policy(trainer, rows, temperature, model.correct) for temperature in study.eval_temperatures]
        trainer.sampler.close()
    return {
        "seed": seed,
        "trained_at": label,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "curves": curves,
        "first_step": trainer.first_step,
        "table": table,
    }


@torch.no_grad()
def evaluate_policy(trainer: GRPOTrainer, rows: Sequence[dict[str, Any]], temperature: float, correct: int) -> JSONObject:
    """Evaluate the trainer's model on rows, with ``eval_rounds`` completions of each, one at T = 0, without truncation.

    Args:
        trainer: whose model, sampler, rewards and settings are used.
        rows: with a ``prompt``, and the columns that the rewards read.
        temperature: to sample at; 0 is greedy decoding.
        correct: index of the reward that says whether an answer is correct.

    Returns:
        ``temperature``, ``samples``, means over the completions (``accuracy``, ``truncated``, ``repetition``, ``distinct`` and ``length``),
        ``entropy`` of softmax(z/T) over the tokens of the first round, in nats, 0 at T = 0, and ``right``: of each row, the share of
        correct completions.
    """
    args, rounds = trainer.args, 1 if temperature == 0 else trainer.args.eval_rounds
    as_chat = trainer.completions.sends_as_chat(trainer.train_dataset, "train_dataset")
    right = torch.zeros(len(rows), dtype=torch.float64)
    shown: list[JSONObject] = []
    texts: list[list[str]] = [[] for _ in rows]
    lengths, truncated, repetition = [], [], []
    entropy, tokens = 0.0, 0
    size = args.per_device_eval_batch_size
    for number in range(rounds):
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            at = [temperature] * len(part)
            drawn = trainer.completions.generate_completions(part, at, "study", number, start, as_chat=as_chat)
            scores = trainer.completions.score(part, drawn, at)[:, correct]
            right[start : start + len(part)] += (scores >= FULL_MARKS).double().cpu()
            if number == 0:
                marks = (scores >= FULL_MARKS).tolist()
                few = zip(part, drawn, marks, strict=True)
                shown += [
                    {"prompt": _question(row["prompt"]), "completion": each.text, "right": mark}
                    for row, each, mark in itertools.islice(few, SHOWN_ROWS - len(shown))
                ]
            for i, each in enumerate(drawn, start):
                texts[i].append(each.text)
                lengths.append(len(each.completion.token_ids))
                truncated.append(not each.completion.finished)
                repetition.append(repeated_ngrams(each.completion.token_ids))
            if number == 0 and temperature > 0:
                zeros = torch.zeros(len(part))
                ids = [each.completion.token_ids for each in drawn]
                rollout = Rollout([each.prompt_ids for each in drawn], ids, zeros + temperature, zeros, zeros == 0)
                found = trainer.model_forward.logprobs(trainer.model_wrapped, rollout, batch_size=size).entropy
                entropy, tokens = entropy + float(found.sum()), tokens + found.numel()
    return {
        "temperature": temperature,
        "samples": len(rows) * rounds,
        "accuracy": float(right.mean()) / rounds,
        "truncated": fmean(truncated),
        "repetition": fmean(repetition),
        "distinct": fmean(distinct_shares([text for of_row in texts for text in of_row], rounds)),
        "length": fmean(lengths),
        "entropy": entropy / max(tokens, 1),
        "right": (right / rounds).tolist(),
        "completions": shown,
    }


def _question(prompt: object) -> str:
    """Return the text of a prompt: of a chat, what its last message says."""
    content = prompt[-1].get("content", "") if isinstance(prompt, list) and prompt and isinstance(prompt[-1], Mapping) else prompt
    return content if isinstance(content, str) else str(content)


def _config(study: TrainingStudy, model: ModelTraining, seed: int, label: str, folder: str) -> GRPOConfig:
    settings: dict[str, Any] = {"metrics_on": "all"} | dict(model.given)  # the curves are over all completions
    settings |= {"seed": seed, "save_strategy": "no", "eval_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    if label != BEFORE:
        variant = study.variants[label]
        settings |= {"temperature_schedule": dict(variant.schedule), **variant.truncation}
    return GRPOConfig(folder, **settings)


class _Progress(TrainerCallback):
    def __init__(self, seed: int, label: str, on_step: Callable[[int, str, int], None]) -> None:
        self.seed, self.label, self.on_step = seed, label, on_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.on_step(self.seed, self.label, 1)
