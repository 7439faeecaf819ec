"""TRL 1.15 and 1.16: its GRPOTrainer with this package's loss, and this package's LM head for every trainer of TRL's.

    from grpo_fast.integrations.trl import GRPOTrainer          # was: from trl import GRPOTrainer

    with fused_lm_head():                                       # GRPO, RLOO, DPO, SFT, KTO: trainers that ask for log-probabilities
        DPOTrainer(...).train()

Both reach into private parts of TRL, so that a version they were not compared with is refused when this module is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_fast.head.api import linear_grpo_loss, linear_token_logprobs
from grpo_fast.integrations.versions import refuse_other_versions
from grpo_fast.loss.api import GRPOOutput, TokenLogprobs
from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.importance import vespo_phi
from grpo_fast.loss.logprob_loss import kl_penalty
from grpo_fast.loss.sequences import Sequences
from grpo_fast.models.lm_head import ModelHead, head_of, hidden_states_of
from grpo_fast.models.unwrap import unwrap

__all__ = ["GRPOTrainer", "fused_lm_head"]

refuse_other_versions(
    "trl",
    "grpo_fast.integrations.trl",
    "It reaches into TRL's private methods. With another version, call gf.grpo_loss in a subclass of your own: docs/plain.md.",
    needed=True,
)

import trl  # noqa: E402
import trl.trainer.grpo_trainer as trl_grpo  # noqa: E402
import trl.trainer.utils as trl_utils  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

# The LM head of a model -----------------------------------------------------------------------------------------------------------------


class _Head(NamedTuple):
    """A model's hidden states and what turns them into logits, within one call of the model."""

    hidden: Tensor  # [B, S, D]
    head: ModelHead
    temperature: float
    in_float32: bool  # cast_lm_head_to_fp32

    def loss(self, token_ids: Tensor, advantages: Tensor, **options: Any) -> GRPOOutput:
        """Of the last T tokens, token_ids [B, T]."""
        with self._autocast():
            hidden, how = self._scored(token_ids)
            return linear_grpo_loss(hidden, token_ids=token_ids, advantages=advantages, **how, **options)

    def logprobs(self, token_ids: Tensor, mask: Tensor) -> TokenLogprobs:
        """Of the last T tokens, token_ids [B, T]."""
        with self._autocast():
            hidden, how = self._scored(token_ids)
            return linear_token_logprobs(hidden, token_ids=token_ids, mask=mask, **how)

    def _autocast(self) -> Any:
        return torch.autocast(self.hidden.device.type, enabled=False) if self.in_float32 else nullcontext()

    def _scored(self, token_ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        hidden = self.hidden[:, -token_ids.shape[1] - 1 :]
        return hidden, {**self.head.arguments(hidden), "temperature": self.temperature}


def _install(model: Any, temperature: Callable[[], float], in_float32: bool) -> None:
    """Let ``model(..., fused_lm_head=f)`` run the model's backbone and the loss f of its _Head, within the forward pass that what wraps the
    model (data parallelism, mixed precision) knows; and answer TRL's own ``fused_lm_head=True`` in the same way."""
    given_forward = model.forward

    @functools.wraps(type(model).forward)  # generate() looks at the signature
    def forward(self: Any, *args: Any, fused_lm_head: Any = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if fused_lm_head is False:
            return given_forward(*args, **kwargs) if labels is None else given_forward(*args, labels=labels, **kwargs)
        run = functools.partial(given_forward, *args)
        hidden, model_head, output = hidden_states_of(self, {**kwargs, "use_cache": False}, forward=run)
        head = _Head(hidden.float() if in_float32 else hidden, model_head, temperature(), in_float32)
        aux_loss = output.aux_loss if kwargs.get("output_router_logits") else None
        if callable(fused_lm_head):
            out = fused_lm_head(head)
            return out.loss, out, aux_loss  # the loss by itself too: what wraps a model looks for tensors, and not always into dataclasses
        assert labels is not None  # TRL's own call
        targets = labels[:, 1:].to(hidden.device)
        scored = head.logprobs(targets, targets != -100)
        return trl_utils.FusedCausalLMOutput(
            log_probs=scored.logprobs, entropy=scored.entropy, label_mask=targets != -100, aux_loss=aux_loss
        )

    model.forward = types.MethodType(forward, model)


# GRPO -----------------------------------------------------------------------------------------------------------------------------------

_MODEL_INPUTS = (  # of TRL's batches, what goes to the model as it is
    "pixel_values",
    "image_grid_thw",
    "image_position_ids",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
)
_OPTIONS_READ_HERE = {
    "temperature", "beta", "epsilon", "epsilon_high", "delta", "loss_type", "importance_sampling_level", "use_bias_correction_kl",
    "max_completion_length",
    "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
    "entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target",
    "top_entropy_quantile", "off_policy_mask_threshold", "vllm_importance_sampling_correction", "steps_per_generation",
    "cast_lm_head_to_fp32", "router_aux_loss_coef",
}  # fmt: skip
_OPTIONS_LEFT_TO_TRL = {  # generation, rewards, advantages, logging: what comes before the loss and after it
    "model_init_kwargs", "trust_remote_code", "disable_dropout", "ds3_gather_for_generation", "sync_ref_model", "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "num_generations", "num_generations_eval", "generation_batch_size", "num_iterations", "shuffle_dataset", "pad_to_multiple_of",
    "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "chat_template_kwargs", "cache_implementation",
    "max_tool_calling_iterations",
    "use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged",
    "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex", "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization", "vllm_max_model_length",
    "vllm_tensor_parallel_size",
    "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_cap",
    "reward_weights", "multi_objective_aggregation", "scale_rewards", "mask_truncated_completions",
    "log_completions", "log_multimodal", "log_unique_prompts", "log_completions_hub_repo", "num_completions_to_print",
}  # fmt: skip


def _refuse_unknown_options(args: Any) -> None:
    known = {*_OPTIONS_READ_HERE, *_OPTIONS_LEFT_TO_TRL, *(field.name for field in dataclasses.fields(TrainingArguments))}
    for field in dataclasses.fields(trl.GRPOConfig):
        if field.name not in known and getattr(args, field.name) != field.default:
            raise ValueError(
                f"GRPOTrainer: {field.name} is {getattr(args, field.name)!r}; expected its default, {field.default!r}: this option of "
                "GRPOConfig is not known here, and would be without effect. Leave it out, or take TRL's own trainer."
            )


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's GRPOTrainer: the same arguments, the same losses and metrics, by one pass over the hidden states.

    Logits are never held. Tokens that cannot change the gradient (groups of equal rewards, tokens outside of the top entropies) cost no
    backward pass of the head. Metrics are read when they are logged, and not in every micro-batch. LoRA may sit on the LM head.
    ``trainer.temperature`` may be changed at any time: the next completions are sampled at it, and each batch's loss is at the temperature
    that the batch was sampled at.

    Args:
        metrics_on: ``"all"``: TRL's metrics over all tokens. ``"active"``: tokens that cannot change the gradient are not computed at all;
            the entropy is then the mean over the others, and a token that a mask leaves out counts as not clipped. With
            use_adaptive_entropy, whose controller wants the entropy of all, it is as ``"all"``.
        args, kwargs: TRL's own.

    Raises:
        ValueError: an option of GRPOConfig has no counterpart here: names it and says what to do.
    """

    entropy_coef: float  # TRL's own attributes
    _entropy_window_stats: Tensor | None

    def __init__(self, *args: Any, metrics_on: str = "all", **kwargs: Any):
        if metrics_on not in ("all", "active"):
            raise ValueError(f"GRPOTrainer: metrics_on is {metrics_on!r}; expected 'all' or 'active'.")
        with _lora_on_the_head_allowed():
            super().__init__(*args, **kwargs)
        _refuse_unknown_options(self.args)
        self.metrics_on = metrics_on
        self._waiting: dict[str, list[tuple[tuple[_Metric, ...], Tensor]]] = {"train": [], "eval": []}
        base = unwrap(self.model)
        self._refuse_unsupported(base)
        for model in (base, self.ref_model):
            if model is not None:
                _install(model, lambda: self.temperature, self.args.cast_lm_head_to_fp32)

    @property
    def temperature(self) -> float:
        """At which the next completions are sampled."""
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise ValueError(f"GRPOTrainer: temperature is {temperature!r}; expected a finite number above 0, at which the sampler draws.")
        self._temperature = float(temperature)
        for sampler in (getattr(self, "generation_config", None), getattr(self, "vllm_generation", None)):
            if sampler is not None:
                sampler.temperature = self._temperature
        if hasattr(self, "generation_kwargs"):  # which go before the model's own generation_config
            self.generation_kwargs["temperature"] = self._temperature

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        sampled_at = torch.tensor(self.temperature, dtype=torch.float64)  # on the CPU, where reading it stalls nothing
        return {**super()._generate_and_score_completions(inputs), "temperature": sampled_at}

    def _refuse_unsupported(self, model: Any) -> None:
        from transformers.integrations import is_deepspeed_zero3_enabled

        if is_deepspeed_zero3_enabled():
            raise ValueError("GRPOTrainer: DeepSpeed's stage is 3 (ZeRO-3); expected 2 or less, or FSDP2: the head's weight is used whole.")
        if self.top_entropy_quantile < 1.0 and self._entropy_bonus_enabled:
            raise ValueError(
                f"GRPOTrainer: top_entropy_quantile is {self.top_entropy_quantile} with an entropy bonus (entropy_coef or "
                "use_adaptive_entropy); expected one of the two: the bonus acts on all tokens here."
            )
        head = head_of(model)  # or it says why the head is not known
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

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mode = "train" if self.model.training else "eval"
        token_ids = inputs["completion_ids"]
        mask = inputs["completion_mask"] if "tool_mask" not in inputs else inputs["completion_mask"] * inputs["tool_mask"]
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1
        scaling = self._scaling(inputs["num_items_in_batch"], mode, accumulation)
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        old = inputs.get("old_per_token_logps")
        temperature = inputs["temperature"].item() if "temperature" in inputs else self.temperature

        def loss_of(head: _Head) -> GRPOOutput:
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
        metrics = _Metrics(out, mask, inputs["advantages"], old, scaling["config"])
        if self._entropy_bonus_enabled:
            metrics.add_policy_loss(self._entropy_coef_now(), accumulation)
            self._adapt_entropy(metrics, mode)
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
            metrics.add("aux_loss", "average", aux_loss.detach())
        metrics.add_all(inputs.get("ref_per_token_logps"), inputs.get("importance_sampling_ratio") if corrected else None)
        self._waiting[mode].append(metrics.packed())
        return loss

    def _scaling(self, num_items: Tensor, mode: str, accumulation: int) -> dict[str, Any]:
        """The settings, and what the sum of a micro-batch is divided by. num_items: tokens of all micro-batches of all processes."""
        coefficient = self._entropy_coef_now()
        config = self._loss_config(coefficient)
        if config.resolved_aggregation != "global_token_mean":
            return {"config": config, "loss_scale": 1 / accumulation}
        micro_batches = self.accelerator.num_processes * (self.args.steps_per_generation if mode == "train" else 1)
        config = dataclasses.replace(config, entropy_coef=coefficient / micro_batches)  # the bonus is a mean already
        return {"config": config, "num_items": num_items, "loss_scale": micro_batches / accumulation}

    def _advantages(self, head: _Head, inputs: dict[str, Any], mask: Tensor) -> Tensor:
        """With the tokens that a mask of the surrogate leaves out at 0: they have no gradient then, and the head drops them."""
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

    def _adapt_entropy(self, metrics: _Metrics, mode: str) -> None:
        """TRL's controller: at the end of an optimizer step, the coefficient moves by whether the entropy of its tokens is below the
        target."""
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
        """TRL's, after the metrics of the micro-batches since the last time were read: one synchronisation and one collective."""
        mode = "train" if self.model.training else "eval"
        waiting, self._waiting[mode] = self._waiting[mode], []
        if waiting:
            names = waiting[0][0]
            values = torch.stack([packed for _, packed in waiting])  # [micro-batches, values]
            by_process = self.accelerator.gather(values.unsqueeze(0)).tolist()
            for batch in range(len(waiting)):
                _unpack(names, [process[batch] for process in by_process], self._metrics[mode])
        super().log(logs, start_time)


@contextmanager
def _lora_on_the_head_allowed() -> Iterator[None]:
    """TRL refuses an adapter on the LM head, whose weight it reads as it is; ours is asked for its adapter."""
    name = "BaseTunerLayer"
    given = getattr(trl_grpo, name, None)
    if given is None:  # without peft
        yield
        return
    setattr(trl_grpo, name, type("NoLayer", (), {}))
    try:
        yield
    finally:
        setattr(trl_grpo, name, given)


class _Metric(NamedTuple):
    """One of TRL's metrics and how the numbers of several processes become one: mean (of a sum and a count), min, max, or average."""

    name: str
    kind: str

    @property
    def size(self) -> int:
        return 2 if self.kind == "mean" else 1


class _Metrics:
    """TRL's metrics of a micro-batch, under TRL's names, as tensors that nobody has read yet."""

    def __init__(self, out: GRPOOutput, mask: Tensor, advantages: Tensor, old: Tensor | None, config: LossConfig):
        self.out, self.config = out, config
        self.computed = out.active
        self.counts = mask != 0
        self.advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        log_ratio = torch.zeros_like(out.logprobs) if old is None else torch.where(self.computed, out.logprobs - old, 0)
        self.log_ratio = log_ratio  # [B, T]
        if config.level == "sequence":  # [B, 1], as TRL has it
            log_ratio = log_ratio.sum(-1, keepdim=True) / self.counts.sum(-1, keepdim=True).clamp(min=1)
        self.ratio = log_ratio.clamp(-config.log_ratio_clamp, config.log_ratio_clamp).exp()
        self.count = self.computed.sum().float()
        self.entropy_sum = out.entropy.sum()
        self.names: list[_Metric] = []
        self.values: list[Tensor] = []

    def add(self, name: str, kind: str, *values: Tensor) -> None:
        self.names.append(_Metric(name, kind))
        self.values += [value.float() for value in values]

    def packed(self) -> tuple[tuple[_Metric, ...], Tensor]:
        return tuple(self.names), torch.stack(self.values)

    @torch.no_grad()
    def add_policy_loss(self, entropy_coef: float, accumulation: int) -> None:
        """The loss without the entropy bonus, which TRL logs before it divides by the accumulation steps, unless num_items do that."""
        bonus = entropy_coef * self.entropy_sum / self.count.clamp(min=1)
        by_items = self.config.resolved_aggregation == "global_token_mean"
        self.add("policy_loss", "average", (self.out.loss + bonus / accumulation) * (1 if by_items else accumulation))

    @torch.no_grad()
    def add_all(self, ref: Tensor | None, rollout_weights: Tensor | None) -> None:
        config, ratio, advantages = self.config, self.ratio, self.advantages
        if config.beta != 0 and ref is not None:
            kl = kl_penalty(self.out.logprobs, ref, config.kl_estimator, config.log_ratio_clamp)
            self._add_mean("kl", kl * ratio if config.bias_corrected_kl else kl)
        self.add("entropy", "mean", self.entropy_sum, self.count)
        if config.surrogate == "clip":
            low = (ratio < 1 - config.epsilon_low) & (advantages < 0)
            high = (ratio > 1 + config.epsilon_high) & (advantages > 0)
            for name, clipped in (("low", low), ("high", high), ("region", low | high)):
                self._add_mean(f"clip_ratio/{name}_mean", clipped.float())
            self.add("clip_ratio/low_min", "min", self._by_sequence(low.float()).nan_to_num(nan=math.inf).amin())
            self.add("clip_ratio/high_max", "max", self._by_sequence(high.float()).nan_to_num(nan=-math.inf).amax())
        elif config.surrogate == "cispo":
            self._add_mean("cispo_clip_ratio", ((ratio > config.epsilon_high) & (advantages > 0)).float())
        elif config.surrogate == "vespo":
            log_rollout = None
            if rollout_weights is not None:
                logs = torch.where(self.counts, rollout_weights, 1).log().clamp(math.log(1e-8), config.log_ratio_clamp)
                log_rollout = logs.sum(-1, keepdim=True)
            self._add_mean("vespo/phi_seq_mean", vespo_phi(self.log_ratio, advantages, log_rollout, Sequences(self.computed), config))

    def _add_mean(self, name: str, x: Tensor) -> None:
        if x.shape[1] == 1:  # one number per sequence
            self.add(name, "mean", x.sum(), torch.full_like(self.count, x.shape[0]))
        else:
            self.add(name, "mean", torch.where(self.counts, x, 0).sum(), self.counts.sum())

    def _by_sequence(self, x: Tensor) -> Tensor:
        return x.squeeze(1) if x.shape[1] == 1 else torch.where(self.counts, x, 0).sum(-1) / self.counts.sum(-1)


def _unpack(names: tuple[_Metric, ...], by_process: list[list[float]], metrics: dict[str, list[float]]) -> None:
    start = 0
    for metric in names:
        parts = [values[start : start + metric.size] for values in by_process]
        start += metric.size
        if metric.kind == "mean":
            value = sum(part[0] for part in parts) / max(sum(part[1] for part in parts), 1.0)
        elif metric.kind == "average":
            value = sum(part[0] for part in parts) / len(parts)
        else:
            value = (min if metric.kind == "min" else max)(part[0] for part in parts)
            value = value if math.isfinite(value) else math.nan
        metrics[metric.name].append(value)


# The LM head alone ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def fused_lm_head() -> Iterator[None]:
    """Within it, every trainer of TRL's that calls its model with ``fused_lm_head=True`` (GRPO, RLOO, DPO, SFT, KTO) computes
    log-probabilities with this package's head, on every device. Patches two private names of trl.trainer.utils, and puts them back.

    Example:
        >>> with fused_lm_head():  # doctest: +SKIP
        ...     SFTTrainer(model, args, train_dataset=dataset).train()
    """
    ours = {"_ChunkedLogProbFunction": _LogProbs, "_use_triton": _always}
    given = {name: getattr(trl_utils, name) for name in ours if hasattr(trl_utils, name)}  # 1.15 has but the first
    for name in given:
        setattr(trl_utils, name, ours[name])
    try:
        yield
    finally:
        for name, value in given.items():
            setattr(trl_utils, name, value)


def _always(device: torch.device) -> bool:
    """In TRL, whether positions without a label are left out rather than scored and thrown away."""
    return True


class _LogProbs:
    """What TRL calls in place of its ChunkedLogProbFunction: the same arguments and results."""

    @staticmethod
    def apply(
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # int64 [N]
        temperature: float,
        chunk_size: int,  # of the vocabulary; chunks are of tokens here
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        if hasattr(weight, "ds_id"):
            raise ValueError("fused_lm_head: the head's weight is split by DeepSpeed's ZeRO-3; expected it whole. Take stage 2, or FSDP2.")
        scored = linear_token_logprobs(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=final_logit_softcapping, logit_scale=logit_scale
        )
        others = dict.fromkeys(("log_sum_sq_probs", "mean_logits", "is_top1"))
        wanted = [name for name in others if name in outputs]
        if wanted:
            found = _other_statistics(hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale)
            others.update({name: found[name] for name in wanted})
        entropy = scored.entropy if "entropy" in outputs else None
        return scored.logprobs, entropy, others["log_sum_sq_probs"], others["mean_logits"], others["is_top1"]


@torch.no_grad()
def _other_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
) -> dict[str, Tensor]:
    """What SFT and DPO log, in a pass of its own, some rows of logits at a time; logits of the type of the hidden states, as in TRL."""
    rows = max(1, 2**26 // weight.shape[0])
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    log_sum_sq_probs = hidden.new_empty(targets.shape, dtype=torch.float32)
    mean_logits, is_top1 = torch.empty_like(log_sum_sq_probs), torch.empty_like(targets, dtype=torch.bool)
    for start in range(0, targets.shape[0], rows):
        part = slice(start, start + rows)
        logits = F.linear(hidden[part], weight, bias).float() * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        log_sum_sq_probs[part] = (2 * logits.log_softmax(-1)).logsumexp(-1)
        mean_logits[part] = logits.mean(-1)
        is_top1[part] = logits.argmax(-1) == targets[part]
    return {"log_sum_sq_probs": log_sum_sq_probs, "mean_logits": mean_logits, "is_top1": is_top1}
