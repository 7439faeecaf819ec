"""TRL's GRPOTrainer with this package's loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
import trl
import trl.trainer.grpo_trainer as trl_grpo
from torch import Tensor, nn

from grpo_fast.integrations.trl.lm_head import HeadCall, install_head_forward
from grpo_fast.integrations.trl.metrics import MetricBatch, MicroBatchMetrics, append_reduced
from grpo_fast.integrations.trl.options import refuse_unknown_options
from grpo_fast.loss.api import GRPOOutput
from grpo_fast.loss.config import LossConfig
from grpo_fast.models.lm_head import head_of
from grpo_fast.models.unwrap import unwrap

__all__ = ["GRPOTrainer"]

Batch = dict[str, Any]  # of TRL: tensors, and strings for its log


class LossScaling(TypedDict):
    """The arguments of the loss that determine the denominator of its sum over tokens."""

    config: LossConfig
    num_items: Tensor | None
    loss_scale: float


_MODEL_INPUTS = (  # the entries of TRL's batches that are passed on to the model
    "pixel_values",
    "image_grid_thw",
    "image_position_ids",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
)


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's GRPOTrainer with the same arguments, losses and metrics, computed in one pass over the hidden states.

    The full logits are never in memory. Tokens that cannot change the gradient (groups of equal rewards, tokens below the top entropy
    quantile) cost no backward pass of the head. Metrics are read from the device when they are logged, not in every micro-batch. The LM
    head may have LoRA. ``trainer.temperature`` may be set at any time: the next completions are sampled at it, and the loss of each batch
    uses the temperature that the batch was sampled at.

    Args:
        metrics_on: ``"all"``: TRL's metrics over all tokens. ``"active"``: tokens that cannot change the gradient are not computed at all;
            the entropy is then the mean over the others, and a token that is not computed counts as not clipped. With
            use_adaptive_entropy, whose controller needs the entropy of all tokens, ``"active"`` means ``"all"``.
        args, kwargs: those of TRL's GRPOTrainer.

    Raises:
        ValueError: an option of GRPOConfig has no counterpart here; the message names it and the fix.

    Example:
        >>> trainer = GRPOTrainer("Qwen/Qwen3-0.6B", reward_func, args, train_dataset=dataset)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    entropy_coef: float  # TRL's own attributes
    _entropy_window_stats: Tensor | None

    def __init__(self, *args: Any, metrics_on: str = "all", **kwargs: Any) -> None:
        if metrics_on not in ("all", "active"):
            raise ValueError(f"GRPOTrainer: metrics_on is {metrics_on!r}; expected 'all' or 'active'.")
        with _allow_lora_on_head():
            super().__init__(*args, **kwargs)
        refuse_unknown_options(self.args)
        self.metrics_on = metrics_on
        self._unlogged: dict[str, list[MetricBatch]] = {"train": [], "eval": []}
        base = unwrap(self.model)
        self._refuse_unsupported(base)
        for model in (base, self.ref_model):
            if model is not None:
                install_head_forward(model, lambda: self.temperature, self.args.cast_lm_head_to_fp32)

    @property
    def temperature(self) -> float:
        """The temperature at which the next completions are sampled."""
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise ValueError(f"GRPOTrainer: temperature is {temperature!r}; expected a finite number above 0, at which the sampler draws.")
        self._temperature = float(temperature)
        for sampler in (getattr(self, "generation_config", None), getattr(self, "vllm_generation", None)):
            if sampler is not None:
                sampler.temperature = self._temperature
        if hasattr(self, "generation_kwargs"):  # these take precedence over the model's own generation_config
            self.generation_kwargs["temperature"] = self._temperature

    def _generate_and_score_completions(self, inputs: list[Batch]) -> Batch:
        sampled_at = torch.tensor(self.temperature, dtype=torch.float64)  # on the CPU, so that reading it does not synchronise
        return {**super()._generate_and_score_completions(inputs), "temperature": sampled_at}

    def _refuse_unsupported(self, model: nn.Module) -> None:
        from transformers.integrations import is_deepspeed_zero3_enabled

        if is_deepspeed_zero3_enabled():
            raise ValueError("GRPOTrainer: DeepSpeed's stage is 3 (ZeRO-3); expected 2 or less, or FSDP2: the head needs its whole weight.")
        if self.top_entropy_quantile < 1.0 and self._entropy_bonus_enabled:
            raise ValueError(
                f"GRPOTrainer: top_entropy_quantile is {self.top_entropy_quantile} with an entropy bonus (entropy_coef or "
                "use_adaptive_entropy); expected one of the two: the bonus acts on all tokens here."
            )
        head = head_of(model)  # raises if the head is not supported
        if self.args.cast_lm_head_to_fp32 and head.adapters:
            raise ValueError("GRPOTrainer: cast_lm_head_to_fp32 is True with LoRA on 'lm_head'; expected one of the two.")
        self._loss_config(0.0)

    def _loss_config(self, entropy_coef: float) -> LossConfig:
        names: tuple[str, ...] = ("delta", "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg")
        names += ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
        return LossConfig.like(
            "trl",
            loss_type=self.loss_type,
            epsilon=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            beta=self.beta,
            entropy_coef=entropy_coef,
            importance_sampling_level=self.importance_sampling_level,
            max_completion_length=self.max_completion_length,
            **{name: getattr(self.args, name) for name in names},
        )

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        mode = "train" if self.model.training else "eval"
        token_ids = inputs["completion_ids"]
        mask = inputs["completion_mask"] if "tool_mask" not in inputs else inputs["completion_mask"] * inputs["tool_mask"]
        accumulation_steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        scaling = self._scaling(inputs["num_items_in_batch"], mode, accumulation_steps)
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        old = inputs.get("old_per_token_logps")
        temperature = inputs["temperature"].item() if "temperature" in inputs else self.temperature

        def loss_of(head: HeadCall) -> GRPOOutput:
            head = head._replace(temperature=temperature)
            return head.loss(
                token_ids,
                self._advantages(head, inputs, mask),
                old_logprobs=old,
                ref_logprobs=inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
                mask=mask,
                rollout_weights=inputs["importance_sampling_ratio"] if corrected else None,
                metrics_on="all" if self.use_adaptive_entropy else self.metrics_on,
                **scaling,
            )

        model_inputs = {name: inputs[name] for name in _MODEL_INPUTS if inputs.get(name) is not None}
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        with self.accelerator.autocast():
            loss, out, aux_loss = model(
                input_ids=torch.cat([inputs["prompt_ids"], token_ids], 1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                fused_lm_head=loss_of,
                **model_inputs,
            )
        metrics = MicroBatchMetrics(out, mask, inputs["advantages"], old, scaling["config"])
        if self._entropy_bonus_enabled:
            metrics.add_policy_loss(self._entropy_coef_now(), accumulation_steps)
            self._adapt_entropy(metrics, mode)
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation_steps
            metrics.add("aux_loss", "average", aux_loss.detach())
        metrics.add_all(inputs.get("ref_per_token_logps"), inputs.get("importance_sampling_ratio") if corrected else None)
        self._unlogged[mode].append(metrics.batch())
        return loss

    def _scaling(self, num_items: Tensor, mode: str, accumulation_steps: int) -> LossScaling:
        """Return the arguments that normalise the loss: config, num_items (tokens of all micro-batches of all processes), loss_scale."""
        coefficient = self._entropy_coef_now()
        config = self._loss_config(coefficient)
        if config.resolved_aggregation != "global_token_mean":
            return {"config": config, "num_items": None, "loss_scale": 1 / accumulation_steps}
        micro_batches = self.accelerator.num_processes * (self.args.steps_per_generation if mode == "train" else 1)
        config = dataclasses.replace(config, entropy_coef=coefficient / micro_batches)  # the bonus is already a mean over tokens
        return {"config": config, "num_items": num_items, "loss_scale": micro_batches / accumulation_steps}

    def _advantages(self, head: HeadCall, inputs: Batch, mask: Tensor) -> Tensor:
        """Return the advantages, with 0 for the tokens that the off-policy or top-entropy mask excludes: the head skips tokens without a
        gradient."""
        advantages = inputs["advantages"]
        if self.top_entropy_quantile >= 1.0 and self.off_policy_mask_threshold is None:
            return advantages
        with torch.no_grad():
            now = head.logprobs(inputs["completion_ids"], mask)
        per_token = (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand(mask.shape)
        if self.off_policy_mask_threshold is not None:
            old = inputs.get("old_per_token_logps")
            keep = self.get_off_policy_mask(
                advantages=per_token,
                per_token_logps=now.logprobs,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", now.logprobs if old is None else old),
                mask=mask,
                off_policy_threshold=self.off_policy_mask_threshold,
            )
            per_token = torch.where(keep != 0, per_token, 0)
        if self.top_entropy_quantile < 1.0:
            per_token = torch.where(self.get_high_entropy_mask(now.entropy, mask, 1 - self.top_entropy_quantile), per_token, 0)
        return per_token

    def _entropy_coef_now(self) -> float:
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            return 0.0
        return float(self.entropy_coef)

    def _adapt_entropy(self, metrics: MicroBatchMetrics, mode: str) -> None:
        """TRL's controller: after an optimizer step, raise the coefficient if the step's entropy is at most the target, else lower it."""
        if mode != "train":
            return
        if self.use_adaptive_entropy:
            stats = torch.stack([metrics.entropy_sum, metrics.count])
            self._entropy_window_stats = stats if self._entropy_window_stats is None else self._entropy_window_stats + stats
            if self.accelerator.sync_gradients:
                total, count = self.accelerator.reduce(self._entropy_window_stats, reduction="sum").tolist()
                self._last_world_entropy = total / max(count, 1.0)
                below = self._last_world_entropy <= self.args.entropy_target
                moved = self.entropy_coef + (self.args.entropy_coef_delta if below else -self.args.entropy_coef_delta)
                self.entropy_coef = min(moved, self.args.entropy_coef_max) if below else max(moved, self.args.entropy_coef_min)
                self._entropy_window_stats = None
        if self.accelerator.sync_gradients:
            self._metrics[mode]["entropy_coef"].append(self.entropy_coef)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Call TRL's log, after the metrics of the micro-batches since the last call are read with one synchronisation and one
        collective."""
        mode = "train" if self.model.training else "eval"
        unlogged, self._unlogged[mode] = self._unlogged[mode], []
        if unlogged:
            names = unlogged[0][0]
            values = torch.stack([values for _, values in unlogged])  # [micro-batches, values]
            by_process = self.accelerator.gather(values.unsqueeze(0)).tolist()
            for batch in range(len(unlogged)):
                append_reduced(names, [process[batch] for process in by_process], self._metrics[mode])
        super().log(logs, start_time)


@contextmanager
def _allow_lora_on_head() -> Iterator[None]:
    """Switch off TRL's check that the LM head has no adapter. TRL ignores the adapter, this package does not."""
    name = "BaseTunerLayer"
    original = getattr(trl_grpo, name, None)
    if original is None:  # without peft
        yield
        return
    setattr(trl_grpo, name, type("NoLayer", (), {}))
    try:
        yield
    finally:
        setattr(trl_grpo, name, original)
