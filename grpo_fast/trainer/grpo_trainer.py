"""GRPOTrainer: group relative policy optimization (arXiv:2402.03300) on transformers' ``Trainer``. Read this file from top to bottom.

    a rollout      get_batch_samples -> RolloutGenerator.generate: prompts, completions, rewards, advantages, old and reference policy
    a step         compute_loss for each micro-batch of the rollout; backward, optimizer and the training loop are transformers'
    an evaluation  evaluate -> evaluate_dataset: several completions per prompt at eval_temperature

The parts are in separate files: rollout_generator.py, completions.py and evaluation.py. sampler_check.py holds the check of the first step,
checkpoints.py and run_state.py save the state of a run, and diagnostics.py computes the metrics.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

import grpo_fast as gf
from grpo_fast.data.streams import Stream, check_evaluation
from grpo_fast.generation import Sampler, make_sampler
from grpo_fast.models.forward import ModelForward
from grpo_fast.models.loading import load_policy
from grpo_fast.models.router import make_router_loss
from grpo_fast.models.unwrap import inner_model
from grpo_fast.rewards.common import Reward
from grpo_fast.trainer.callbacks import add_default_callbacks
from grpo_fast.trainer.checkpoints import AtomicCheckpointTrainer
from grpo_fast.trainer.completions import CompletionRunner
from grpo_fast.trainer.config import GRPOConfig
from grpo_fast.trainer.diagnostics import describe_nonfinite, full_norm, gradient_norm, measure_loss
from grpo_fast.trainer.entropy_control import EntropyControl
from grpo_fast.trainer.evaluation import add_means, evaluate_dataset
from grpo_fast.trainer.metrics import MetricAccumulator, Throughput
from grpo_fast.trainer.prompt_source import RowDataset
from grpo_fast.trainer.prompt_stream import make_prompts
from grpo_fast.trainer.reference_policy import ReferencePolicy
from grpo_fast.trainer.resume import Resumed, load_run, save_run
from grpo_fast.trainer.reward_setup import make_reward_runner
from grpo_fast.trainer.rollout import MicroBatch, Rollout
from grpo_fast.trainer.rollout_generator import RolloutGenerator
from grpo_fast.trainer.sampler_check import SamplerCheck
from grpo_fast.trainer.special_tokens import check_tags
from grpo_fast.trainer.training_hooks import TrainingHooks
from grpo_fast.trainer.trl_metrics import measure_clipping, step_seconds
from grpo_fast.trainer.trl_names import REFUSED_ARGUMENTS, check_arguments
from grpo_fast.utils.files import write_text
from grpo_fast.utils.redaction import redact

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl
    from transformers.trainer_utils import TrainOutput
    from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["GRPOConfig", "GRPOTrainer"]


class GRPOTrainer(AtomicCheckpointTrainer):
    """Trains a causal language model by GRPO (arXiv:2402.03300) and its variants. Constructor and reward functions are those of TRL.

    Args:
        model: a causal language model of transformers, a PEFT model, or the name or folder of a model.
        reward_funcs: one or several functions ``reward(prompts, completions, completion_ids, **columns) -> list[float | None]``, or names
            of rewards of grpo_fast.rewards.
        args: settings; None = ``GRPOConfig()``.
        train_dataset: rows with a ``prompt``, a string or a list of chat messages; the rewards read the other columns. Or a stream of such
            rows: a ``datasets.IterableDataset``, or a function without arguments that returns an iterator.
        eval_dataset: likewise, or a dictionary of several such datasets.
        processing_class: the tokenizer; None = the model's own, found by the model's name.
        callbacks, optimizers: as in transformers' ``Trainer``.
        peft_config: train this adapter in place of the model's weights. The reference policy is then the model without the new adapter,
            which needs no memory. Of a model that comes with a trained adapter, the reference is the model with that adapter.
        quantization_config: passed to ``from_pretrained`` if the model is given by name.
        sampler: an object that draws completions (grpo_fast.generation.Sampler), in place of the sampler that ``args`` name. The caller
            closes it; the trainer closes the sampler that it made itself at the end of `train`, and opens it again for an evaluation.

    Raises:
        ValueError, TypeError: an argument is wrong, or does not fit the others; as far as possible before a model is loaded.

    Example:
        >>> trainer = GRPOTrainer("Qwen/Qwen3-0.6B", accuracy_reward, GRPOConfig("out"), train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    control: TrainerControl

    @check_arguments("GRPOTrainer", REFUSED_ARGUMENTS)
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: str | Reward | Sequence[str | Reward],
        args: GRPOConfig | None = None,
        train_dataset: RowDataset | Stream | None = None,
        eval_dataset: RowDataset | Stream | dict[str, RowDataset | Stream] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        peft_config: PeftConfig | None = None,
        *,
        quantization_config: QuantizationConfigMixin | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        args = GRPOConfig() if args is None else args
        self.rewards = make_reward_runner(reward_funcs, args)
        prompts = None if train_dataset is None else make_prompts(train_dataset, args)
        columns = {} if prompts is None else {"train_dataset": prompts.columns}
        for where, names in (columns | check_evaluation(eval_dataset, args.eval_strategy.value)).items():
            self.rewards.check_columns(names, where)
        self.temperatures = args.make_temperature_schedule()
        self.entropy_control = EntropyControl(args)
        # What adapts to metrics needs those of all rows, not only of those that change the gradient.
        self.metrics_on = "all" if self.temperatures.adaptive or self.entropy_control.adaptive else args.metrics_on
        self.loss_config = args.loss_config()

        loaded, tokenizer = load_policy(
            model, processing_class, peft_config=peft_config, quantization_config=quantization_config, **args.loading_options()
        )
        check_tags(self.rewards, tokenizer, skip_special_tokens=args.skip_special_tokens)
        self.reference = ReferencePolicy(loaded, args, for_rewards=self.rewards.reads("ref_logprobs"))

        super().__init__(
            model=loaded,
            args=args,
            data_collator=lambda rows: rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[*(callbacks or ()), TrainingHooks(self)],
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # compute_loss normalises over the whole step; Trainer must not divide by the micro-batches
        router_loss = make_router_loss(loaded, args.router_aux_loss_coef)
        self.model_forward = ModelForward(self.accelerator, tokenizer.pad_token_id, **args.forward_options(), router_loss=router_loss)
        self.sampler = make_sampler(args.sampler if sampler is None else sampler, self.model, tokenizer, **args.sampler_arguments)
        self._owns_sampler = sampler is None
        self.completions = CompletionRunner(self)
        self.rollouts = None if prompts is None else RolloutGenerator(self, prompts, self.completions)
        self.rollout: Rollout | None = None  # the current one
        self.last_completions: list[dict[str, Any]] = []  # records of the last rollout's completions in this process
        self.metrics, self.metrics_to_log = MetricAccumulator(), MetricAccumulator()  # of this step; of the steps since the last log
        self.throughput = Throughput()
        self.step_tokens: list[int] = []  # tokens in the loss of each optimizer step of the rollout, over all processes
        self.step_sequences: list[int] = []  # likewise the sequences; empty: all of them
        self._losses: list[tuple[gf.GRPOOutput, MicroBatch]] = []  # of the current step
        self._grad_norm: float | Tensor | None = None
        self.resumed: Resumed | None = None  # what the run was resumed from
        self.sampler_check = SamplerCheck(self)
        add_default_callbacks(self)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as transformers' ``Trainer.train``, and close the sampler at the end, also after an error."""
        self.resumed = None
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._owns_sampler:
                self.sampler.close()
                self.completions.forget_weights()

    # Rollouts ------------------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """A loader of as many empty items as there are micro-batches; `get_batch_samples` decides what a micro-batch contains."""
        if self.rollouts is None:
            raise ValueError("train_dataset is None; expected one, to train on.")
        rollouts, args = self.rollouts.prompts.rollouts_per_epoch, self.args
        if rollouts is None:  # of a stream: one epoch, as long as the run
            micro_batches = args.max_steps * args.gradient_accumulation_steps
        else:
            micro_batches = rollouts * args.steps_per_generation * args.num_iterations
        return DataLoader(range(micro_batches), batch_size=1)  # type: ignore[arg-type]

    def get_batch_samples(self, epoch_iterator: Iterator[Tensor], num_batches: int, device: torch.device) -> tuple[list[MicroBatch], int]:
        """The micro-batches of the next optimizer step, from the current rollout or a new one, and the tokens in the loss of the step."""
        if self.stop_if_finished():
            return [], 0
        for _ in range(num_batches):
            next(epoch_iterator, None)
        step, args = self.state.global_step, self.args
        self.reference.follow(self.model_wrapped, self.accelerator.unwrap_model(self.model_wrapped), step)
        number, position = divmod(step, args.updates_per_rollout)
        if position == 0 or self.rollout is None:
            if position != 0:
                raise ValueError(f"the rollout of step {step} is missing; expected it in the checkpoint that was resumed from.")
            assert self.rollouts is not None  # get_train_dataloader has checked it
            self.rollout = self.rollouts.generate(number)
            self.step_tokens, self.step_sequences = self.rollouts.step_tokens(self.rollout), self.rollouts.step_sequences
        minibatch, size = position % args.minibatches, args.per_device_train_batch_size
        first, tokens = minibatch * args.gradient_accumulation_steps, self.step_tokens[minibatch]
        all_sequences = size * args.gradient_accumulation_steps * self.accelerator.num_processes
        sequences = self.step_sequences[minibatch] if self.step_sequences else all_sequences
        batches = []
        for i in range(first, first + args.gradient_accumulation_steps):
            rows = self.rollout.select(range(i * size, (i + 1) * size))
            batches.append(MicroBatch(rows, tokens, sequences, on_policy=position == 0))
        return batches, tokens

    def rows_with_gradient(self, rollout: Rollout) -> list[int]:
        """Rows that can change the gradient, at least one because every process must make a backward pass; all rows if the metrics need
        them.
        """
        needed = self.args.entropy_coef != 0 or self.loss_config.needs_all_tokens
        if self.metrics_on == "all" or needed:
            return list(range(len(rollout)))
        return ((rollout.advantages != 0) & rollout.loss_mask).nonzero().flatten().tolist() or [0]

    # Optimizer steps -----------------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        return inputs  # values per token are on the device already, and the others belong on the CPU

    def floating_point_ops(self, inputs: object) -> int:
        """Estimate the floating-point operations of a micro-batch: six per parameter and token."""
        if not isinstance(inputs, MicroBatch):
            return 0
        tokens = sum(inputs.rows.lengths) + sum(map(len, inputs.rows.prompt_ids))
        return 6 * tokens * sum(p.numel() for p in inner_model(self.model).parameters())

    def _track_num_input_tokens(self, inputs: MicroBatch) -> None:
        """Do nothing: `RolloutGenerator` counts the tokens when it draws the completions."""

    def training_step(self, model: nn.Module, inputs: MicroBatch, num_items_in_batch: int | None = None) -> Tensor:
        """Run transformers' training step, and measure the seconds of its backward pass."""
        loss_before, started = self.metrics.total_seconds("step_time/loss"), time.perf_counter()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        loss_seconds = self.metrics.total_seconds("step_time/loss") - loss_before
        self.metrics.add_seconds("step_time/backward", time.perf_counter() - started - loss_seconds)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: MicroBatch, return_outputs: bool = False, num_items_in_batch: int | None = None
    ) -> Any:  # Tensor, or (Tensor, GRPOOutput) with return_outputs
        """Return the loss of a micro-batch as its share of the loss of the step.

        Gradients are averaged over processes and summed over micro-batches. So sums are divided by the size of the whole step and
        multiplied by the number of processes: any split of the step gives the same loss and gradient.
        """
        scale, num_items = float(self.accelerator.num_processes), None
        # The load balance of routers is that of all rows.
        rows = inputs.rows if self.model_forward.router_loss else inputs.rows.select(self.rows_with_gradient(inputs.rows))
        if self.loss_config.resolved_aggregation == "global_token_mean":
            num_items = max(inputs.step_tokens, 1)
        else:
            scale *= len(rows) / max(inputs.step_sequences, 1)
        with self.metrics.timed("step_time/loss"):
            out = self.model_forward.loss(
                model,
                rows,
                config=self.entropy_control.loss_config(self.loss_config),
                num_items=num_items,
                loss_scale=scale,
                metrics_on=self.metrics_on,
                router_scale=1 / self.args.gradient_accumulation_steps,
            )
        self._losses.append((out._replace(loss=out.loss.detach()), inputs._replace(rows=rows)))
        measure_loss(self.metrics, out, inputs, rows, truncated=self.args.truncates and rows.support is None and not self.args.penalises)
        measure_clipping(self.metrics, out, rows, self.loss_config, left_out=len(rows) < len(inputs.rows))
        return (out.loss, out) if return_outputs else out.loss

    def _clip_grad_norm(self, model: nn.Module) -> float | Tensor | None:
        self._grad_norm = full_norm(super()._clip_grad_norm(model))
        return self._grad_norm

    def check_step(self) -> None:
        """Before the weights change: check that loss and gradient are finite, and that the sampler agrees with the loss.

        Raises:
            FloatingPointError: the loss or the gradient of any process is not finite.
            SamplerError: the sampler's log-probabilities are not those of the loss.
        """
        losses, self._losses = self._losses, []
        finite = torch.stack([out.loss for out, _ in losses]).isfinite().all()
        norm = self._grad_norm if self.args.max_grad_norm else gradient_norm(self.model)
        if isinstance(norm, Tensor) and getattr(self.accelerator, "scaler", None) is None:  # a gradient scaler skips infinite gradients
            finite = finite & norm.isfinite().to(finite.device)
        if self.accelerator.reduce(finite.float(), reduction="sum") < self.accelerator.num_processes:  # so that all processes stop
            where = f"step {self.state.global_step + 1}, process {self.accelerator.process_index}"
            raise FloatingPointError(describe_nonfinite(losses, norm, self.model, where))
        self.sampler_check.check(losses)

    def finish_step(self) -> None:
        """After the weights have changed: adapt the temperature if the step began a rollout, and add its metrics to those to log."""
        self.metrics.steps += 1
        if self.temperatures.adaptive and (self.state.global_step - 1) % self.args.updates_per_rollout == 0:
            self.temperatures.observe(self.metrics.read())
        self.entropy_control.finish_step(self.metrics)
        self.metrics_to_log.merge(self.metrics)
        self.metrics = MetricAccumulator()

    # Evaluation ----------------------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: RowDataset | Stream | dict[str, RowDataset | Stream] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean rewards over ``eval_rounds`` completions per prompt at ``eval_temperature``, with standard errors over the rounds.

        Args:
            eval_dataset: a dataset, a dictionary of several, or the name of one of the trainer's; None = the trainer's ``eval_dataset``.
            ignore_keys: not used.
            metric_key_prefix: of the metrics' names.

        Raises:
            ValueError: there is no dataset.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if isinstance(dataset, dict):
            results: dict[str, float] = {}
            for name, part in dataset.items():
                results |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return add_means(results, list(dataset), metric_key_prefix)
        if dataset is None:
            raise ValueError("eval_dataset is None; expected one, to evaluate on.")
        metrics = evaluate_dataset(self, dataset, metric_key_prefix)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Logs ----------------------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, as transformers' ``Trainer.log``, with the metrics of the steps since the last log."""
        if "loss" in logs:
            logs, self.metrics_to_log = {**logs, **self.metrics_to_log.read()}, MetricAccumulator()
            logs |= {"num_tokens": self.state.num_input_tokens_seen, **step_seconds(logs)}
            rate = self.throughput.measure(self.state.num_input_tokens_seen)
            if rate is not None:
                logs["tokens_per_second"] = rate
            if self.args.log_completions and self.accelerator.is_main_process:
                rows = redact(self.last_completions[: self.args.num_completions_to_print], known_only=True)
                lines = [json.dumps(row, default=str) for row in rows]
                folder = Path(self.args.output_dir) / "completions"
                write_text(folder / f"step-{self.state.global_step:06d}.jsonl", "\n".join(lines) + "\n")
        super().log(logs, start_time)

    # Checkpoints ---------------------------------------------------------------------------------------------------------------

    def save_extra_state(self, folder: Path) -> None:
        """Add the state of the run to a checkpoint."""
        save_run(self, folder)

    def load_extra_state(self, folder: Path) -> None:
        """Read what `save_extra_state` wrote.

        Raises:
            CheckpointError: the file of the state or of the rollout is not valid; or the checkpoint has an unfinished rollout that the
                current settings would split otherwise.
        """
        self.resumed = load_run(self, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with nullcontext() if self.resumed is None else self.resumed.optimizer_settings(self.optimizer, self.lr_scheduler):
            super()._load_optimizer_and_scheduler(checkpoint)

    def create_model_card(self, *args: Any, dataset_name: str | None = None, **kwargs: Any) -> None:
        """Write a model card, as transformers' ``Trainer.create_model_card``; ``dataset_name`` is TRL's name for its ``dataset``."""
        super().create_model_card(*args, **kwargs, **({} if dataset_name is None else {"dataset": dataset_name}))
