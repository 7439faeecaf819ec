"""The settings of GRPOTrainer: transformers' TrainingArguments, and those of GRPO under TRL's names. Checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from grpo_fast.loss.config import LossConfig
from grpo_fast.trainer import config_checks as checks
from grpo_fast.trainer.advantages import check_advantages
from grpo_fast.trainer.best_model import choose_metric, choose_mode
from grpo_fast.trainer.loss_fields import add_loss_fields, make_loss_config, with_surrogate_name
from grpo_fast.trainer.off_policy import check_off_policy, rejections_of
from grpo_fast.trainer.sampling_settings import SamplingSettings, check_generation_kwargs
from grpo_fast.trainer.temperature import TemperatureSchedule
from grpo_fast.trainer.trl_names import explain_wrong_settings
from grpo_fast.utils.redaction import redact

__all__ = ["GRPOConfig"]


@explain_wrong_settings
@dataclass
@add_loss_fields
class GRPOConfig(SamplingSettings, TrainingArguments):
    """Settings of a GRPO run. Names that TRL has mean the same; docs/training.md lists the few defaults that differ.

    Args:
        model_init_kwargs: arguments of ``from_pretrained`` for a model given by name. By default ``attn_implementation`` is ``"auto"``:
            flash attention 3 or 2 where a GPU supports it, else ``"sdpa"``; and ``dtype`` is ``"float32"``, because weights in bfloat16
            lose most of the updates of a usual learning rate (``bf16`` computes in bfloat16 and keeps the weights in float32).
        trust_remote_code: run the code that comes with a model given by name.
        disable_dropout: set dropout to 0, so that the policy that is trained is the one that sampled.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts (``aux_loss`` in the log), which is added to the
            loss; None = that of the model's config. With it, all sequences are run through the model. 0 = none.

        num_generations: completions per prompt: the group whose rewards an advantage compares.
        max_completion_length: length limit of a completion, in tokens.
        steps_per_generation: micro-batches per rollout, a multiple of ``gradient_accumulation_steps``; the quotient is the number of
            optimizer steps ("minibatches") per pass over the rollout. None = one optimizer step.
        generation_batch_size: completions per rollout, over all processes; instead of ``steps_per_generation``. Set at most one of the
            two.
        num_iterations: passes over each rollout (mu).
        shuffle_dataset: use a new order of the prompts in each epoch.
        shuffle_buffer_size: of a stream (a dataset without a length): how many rows are read ahead and, with ``shuffle_dataset``, shuffled.
        chat: whether prompts that are texts are sent as chats, in the tokenizer's chat template: ``"true"`` (or True), ``"false"``, or
            ``"auto"``: those of grpo_fast.tasks are, if there is a template. Rewards get texts in any case.
        chat_template_kwargs: arguments of ``apply_chat_template``.
        dynamic_sampling_attempts: how often groups whose rewards are all equal, and so have no gradient, are drawn again with other prompts
            (DAPO, arXiv:2503.14476). 0 = never.

        temperature: temperature of sampling, of the loss, of old and reference log-probabilities and of the entropy.
        temperature_schedule: how the temperature changes, see `TemperatureSchedule.from_config` (grpo_fast.temperature); None = constant.
        top_p: sample from the smallest set of most likely tokens whose probabilities sum to at least this; 1 = all tokens.
        top_k: sample from this many most likely tokens; 0 = all tokens.
        min_p: sample from tokens that are at least this fraction as likely as the most likely one; None = all tokens.
        repetition_penalty: make tokens of the prompt and of the completion so far less likely (above 1) or likelier (below 1), before the
            temperature (CTRL, arXiv:1909.05858); 1 = no penalty. The loss is that of the policy without the penalty, and weights per token
            correct for the difference, see ``vllm_importance_sampling_correction``. Evaluations are penalised too.
        generation_kwargs: more options of the sampler, by the names of transformers' GenerationConfig (``suppress_tokens``, ``typical_p``,
            ...), or of vLLM's SamplingParams (``logit_bias``, ``bad_words``, ...). Those that change the distribution are treated like
            ``repetition_penalty``, and those that truncate it like ``top_p``; others are refused with the reason.
        replay_support: with truncated sampling (``top_p``, ``top_k``, ``min_p``), score each token over the set that it was drawn from, so
            that the policy that is trained is the policy that sampled (arXiv:2512.02556). ``"auto"``: if the sampler returns the sets;
            True: it must; False: never. Without the sets the loss is that of the whole distribution, and
            ``vllm_importance_sampling_correction`` corrects for the difference. ``sampling/kept_mass`` and ``sampling/set_size`` are
            logged.
        sampler: ``"transformers"``, ``"continuous_batching"`` or ``"vllm"``; or pass an object to the trainer.
        sampler_options: arguments of the sampler's constructor.
        use_vllm: TRL's name for ``sampler="vllm"``.
        vllm_mode: TRL's mode of vLLM; the only one is ``"server"``, vLLM's own server (``vllm serve``).
        vllm_server_base_url: with ``use_vllm``, the server's URL; None = ``vllm_server_host`` and ``vllm_server_port``.
        vllm_server_host: with ``use_vllm``, the server's host.
        vllm_server_port: with ``use_vllm``, the server's port.
        use_transformers_continuous_batching: TRL's name for ``sampler="continuous_batching"``.

        eval_temperature: temperature of evaluations; 0.6 is DeepSeek-R1's, 0 is greedy decoding.
        eval_top_p: ``top_p`` of evaluations; 0.95 is DeepSeek-R1's.
        eval_rounds: completions per prompt in an evaluation; the mean is reported, with its standard error over the rounds.
        num_generations_eval: TRL's name for ``eval_rounds``.

        beta: weight of the KL penalty; 0 needs no reference policy.
        use_bias_correction_kl: ``bias_corrected_kl`` of LossConfig.
        sync_ref_model: let the reference policy follow the policy.
        ref_model_sync_steps: with ``sync_ref_model``, optimizer steps between two updates of the reference.
        ref_model_mixup_alpha: with ``sync_ref_model``, each update sets reference = alpha policy + (1 - alpha) reference.

        loss_type, epsilon, epsilon_high, delta, dual_clip, importance_sampling_level, kl_estimator, entropy_coef: see LossConfig, of which
            `loss_config` makes one; epsilon_high: None = epsilon. The settings of single losses (``sapo_temperature_pos``, ...) are
            copied from LossConfig.
        surrogate: with ``loss_type="custom"``, a function, or the name of one, as in ``"my_loss.py:my_loss"``; see LossConfig and
            docs/custom-loss.md. Stored settings hold its name. Its other parameters without a default are columns of the dataset, one
            number per row.
        aggregation: a name of ``AGGREGATIONS``, without the ``nonempty_`` ones; None = that of the loss type. Means are over the whole
            optimizer step.
        use_adaptive_entropy: adapt the coefficient of the entropy bonus, which begins at ``entropy_coef``, after each step (Skywork-OR1,
            arXiv:2505.22312): it rises while the entropy is at most ``entropy_target``, else it falls, and the bonus is off.
        entropy_coef_min: with ``use_adaptive_entropy``, the least coefficient.
        entropy_coef_max: with ``use_adaptive_entropy``, the largest coefficient.
        entropy_coef_delta: with ``use_adaptive_entropy``, by how much a step changes the coefficient.
        entropy_target: with ``use_adaptive_entropy``, nats per token, the mean over all tokens in the loss. 0.2 is Skywork-OR1's.
        scale_rewards: what a reward minus the mean of its group is divided by: ``"group"``, its standard deviation; ``"batch"``, that of
            the batch; ``"none"`` (True and False mean the first and the third). TRL does not have ``"mean"``: the group's mean (MaxRL,
            arXiv:2602.02710; rewards must be at least 0), and ``"tokens"``: the standard deviation over the tokens of the rollout, whose
            mean is subtracted (REINFORCE++-baseline, arXiv:2501.03262).
        pass_at_k: advantages for the chance that the best of k completions is right ("Pass@k Training", arXiv:2508.10751); below
            ``num_generations``. None = off.
        exclude_degenerate: leave groups whose rewards are all equal out of the loss: their tokens and sequences do not count in its
            denominators, over all processes, nor in the statistics of ``scale_rewards``; and the KL penalty and the entropy bonus do not
            apply to them. False, as in TRL: they are divided by, so that a step with many of them is a small one.
        reward_weights: weights of the rewards, one each; None = all 1.
        multi_objective_aggregation: ``"sum_then_normalize"``, or ``"normalize_then_sum"`` (GDPO, arXiv:2601.05242).
        skip_special_tokens: remove special tokens from the texts of completions that rewards read; False keeps all but the end token.
        reward_timeout: seconds for one call of a reward, None = no limit.
        reward_on_error: what happens when a reward raises, exceeds its time limit or returns something invalid: ``"raise"`` ends the run
            with an error that names it, ``"not_applicable"`` counts as None for these completions.
        reward_isolation: ``"thread"``, or ``"process"``: rewards run in separate processes, which are killed at the time limit.
        mask_truncated_completions: exclude completions that were cut at the length limit from the loss.
        soft_punish_cache: DAPO's soft overlong punishment: a reward that falls from 0 to -1 over this many tokens before
            ``max_completion_length``. None = off.
        top_entropy_quantile: train on this share of the tokens only, those with the highest entropy (arXiv:2506.01939).
        vllm_importance_sampling_correction: weight each token by the ratio of the trainer's probability to the sampler's, for any sampler;
            None = for all but ``"transformers"``, which runs the trainer's own model; and for all with ``repetition_penalty`` or the like.
        vllm_importance_sampling_mode: ``"token_truncate"``, ``"token_mask"``, ``"sequence_truncate"`` or ``"sequence_mask"``. None =
            ``"sequence_mask"``, and ``"token_mask"`` with truncation or penalties, which a weight per sequence cannot correct.
        vllm_importance_sampling_clip_min: lower bound of that weight; None = no bound.
        vllm_importance_sampling_clip_max: upper bound of that weight; None = no bound.
        off_policy_mask_threshold: leave sequences with a negative advantage out of the surrogate if the mean of sampling - current
            log-probability of their tokens is larger than this, in nats (DeepSeek-V3.2, arXiv:2512.02556, equation 9); 0.5 is usual.
            None = off. The sampling log-probabilities are the sampler's, penalties included, else those of the old policy.
        rollout_rs: verl's criteria of rejection, separated by commas: leave a token (``"token_k1"``, ``"token_k2"``, ``"token_k3"``) or its
            sequence out of the surrogate if trainer and sampler are too far apart, by the sum (``"seq_sum_k1"``, ...), the mean
            (``"seq_mean_k1"``, ...: for k1 a band of the geometric mean of the ratios) or the largest (``"seq_max_k2"``, ``"seq_max_k3"``,
            arXiv:2512.23075) of an estimate of their KL divergence, see `gf.rejection_mask`. Importance weights are as without. None = off.
        rollout_rs_threshold: for all of them, or one for each, separated by commas: for k1 bounds of the ratio of sampler to trainer
            (``"0.999_1.001"``; of one number the reciprocal is the lower bound), else the largest divergence, in nats.
        bypass_mode: take the sampler's log-probabilities for those of the old policy, which is not computed (verl's name): for samplers
            that may be several steps behind, so that only the first rollout is compared with ``sampler_tolerance``. The one ratio, of the
            current policy to the sampler, is clipped, and there are no importance weights; ``rollout_rs`` compares the current policy.
        sampler_tolerance: largest mean difference of a token's log-probability between sampler and trainer, in nats, on the first step;
            a larger one stops the run. None = 0.02 in float32, 0.1 otherwise. Each later rollout is compared too.
        sampler_tolerance_patience: how many rollouts in a row may differ by more than ``sampler_tolerance`` before the run stops; the
            first of them warns.

        share_prompts: compute the prompt of a group once, and not for each of its completions, in the forward passes of training and
            scoring: ``"true"`` (or True), ``"false"``, or ``"auto"``: where it saves a fifth of a micro-batch's tokens, if the model
            supports it, which a test on a small batch decides.
        packing: remove padding by placing sequences one after the other in a row: ``"true"`` (or True), ``"false"``, or ``"auto"``: only
            with flash attention.
        fused_head: compute the loss from hidden states wherever the model's head allows it; False = from logits.
        logits_dtype: of the fused head: ``"float32"``: not rounded to the model's dtype; ``"input"``: rounded, as by the model's own head.
        batch_invariant: compute the fused head so that a token's numbers do not depend on the other tokens of a micro-batch, see
            gf.batch_invariant. The model's own layers are not affected.
        metrics_on: ``"active"``: sequences with an advantage of 0 are not run through the model if they cannot change the gradient;
            ``"all"``: they are, and are included in entropy and clip ratios.
        log_completions: write the completions of each logged step to ``output_dir/completions``.
        num_completions_to_print: with ``log_completions``, how many completions to write; None = all.

    Raises:
        ValueError: names the setting, its value, what was expected and how to fix it.

    Example:
        >>> GRPOConfig("out", per_device_train_batch_size=8, gradient_accumulation_steps=4, use_cpu=True).generation_batch_size
        32
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 may be JSON on the command line
        *TrainingArguments._VALID_DICT_FIELDS,
        *("model_init_kwargs", "chat_template_kwargs", "sampler_options", "generation_kwargs", "temperature_schedule"),
    ]

    # Defaults that differ from TrainingArguments, as in TRL.
    learning_rate: float = 1e-6
    logging_steps: float = 10
    gradient_checkpointing: bool = True
    bf16: bool | None = None  # None = where the GPU supports it
    remove_unused_columns: bool | None = False  # the rewards read the columns
    logging_nan_inf_filter: bool = False  # a loss that is not finite ends the run; the filter would synchronise the device

    model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: bool = False
    disable_dropout: bool = True
    router_aux_loss_coef: float | None = None

    num_generations: int = 8
    max_completion_length: int = 512
    steps_per_generation: int | None = None
    generation_batch_size: int | None = None
    num_iterations: int = 1
    shuffle_dataset: bool = True
    shuffle_buffer_size: int = 1000
    chat: str = "auto"
    chat_template_kwargs: dict[str, Any] | str | None = None
    dynamic_sampling_attempts: int = 0

    temperature: float = 1.0
    temperature_schedule: dict[str, Any] | str | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: dict[str, Any] | str | None = None
    replay_support: str = "auto"
    sampler: str = "transformers"
    sampler_options: dict[str, Any] | str | None = None
    use_vllm: bool = False
    vllm_mode: str = "server"
    vllm_server_base_url: str | None = None
    vllm_server_host: str = "0.0.0.0"
    vllm_server_port: int = 8000
    use_transformers_continuous_batching: bool = False

    eval_temperature: float = 0.6
    eval_top_p: float = 0.95
    eval_rounds: int = 4
    num_generations_eval: int | None = None

    beta: float = 0.0
    use_bias_correction_kl: bool = True
    sync_ref_model: bool = False
    ref_model_sync_steps: int = 512
    ref_model_mixup_alpha: float = 0.6

    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    importance_sampling_level: str | None = None
    surrogate: str | None = None
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    use_adaptive_entropy: bool = False
    entropy_coef_min: float = 0.0
    entropy_coef_max: float = 1.0
    entropy_coef_delta: float = 0.005
    entropy_target: float = 0.2

    scale_rewards: str = "group"
    reward_weights: list[float] | None = None
    multi_objective_aggregation: str = "sum_then_normalize"
    pass_at_k: int | None = None
    exclude_degenerate: bool = False
    skip_special_tokens: bool = True
    reward_timeout: float | None = None
    reward_on_error: str = "raise"
    reward_isolation: str = "thread"
    mask_truncated_completions: bool = False
    soft_punish_cache: int | None = None
    top_entropy_quantile: float = 1.0
    vllm_importance_sampling_correction: bool | None = None
    vllm_importance_sampling_mode: str | None = None
    vllm_importance_sampling_clip_min: float | None = None
    vllm_importance_sampling_clip_max: float | None = 3.0
    off_policy_mask_threshold: float | None = None
    rollout_rs: str | None = None
    rollout_rs_threshold: str | None = None
    bypass_mode: bool = False
    sampler_tolerance: float | None = None
    sampler_tolerance_patience: int = 3

    share_prompts: str = "auto"
    packing: str = "auto"
    fused_head: bool = True
    logits_dtype: str = "float32"
    batch_invariant: bool = False
    metrics_on: str = "active"
    log_completions: bool = False
    num_completions_to_print: int | None = None

    def __post_init__(self) -> None:
        checks.convert_types(self, GRPOConfig.__annotations__)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        choose_metric(self)
        checks.resolve_checkpointing(self)
        super().__post_init__()
        choose_mode(self)
        checks.check_sampler(self)
        self.replay_support = checks.parse_bool(self.replay_support)  # type: ignore[assignment]
        self.share_prompts = checks.parse_bool(self.share_prompts)  # type: ignore[assignment]
        self.packing = checks.parse_bool(self.packing)  # type: ignore[assignment]  # a str for the command line, see parse_bool
        self.chat = checks.parse_bool(self.chat)  # type: ignore[assignment]
        scale = checks.parse_bool(self.scale_rewards)
        self.scale_rewards = ("group" if scale else "none") if isinstance(scale, bool) else scale
        checks.check_batches(self)
        checks.check_sampling(self)
        check_generation_kwargs(self)
        schedule = self.temperature if self.temperature_schedule is None else self.temperature_schedule
        self._schedule = TemperatureSchedule.from_config(schedule)  # type: ignore[arg-type]  # TrainingArguments has parsed JSON; warns if it goes below 0.7
        checks.check_rewards(self)
        check_advantages(self)
        check_off_policy(self)
        checks.check_entropy(self)
        checks.check_training(self)
        self.loss_config()

    def to_dict(self) -> dict[str, Any]:
        """The settings for trackers, model cards and logs, as in TrainingArguments, with every secret redacted, nested ones too."""
        return with_surrogate_name(redact(super().to_dict()))

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the name of a custom surrogate in place of the function, which may not be picklable."""
        return with_surrogate_name(dict(self.__dict__))

    def __str__(self) -> str:
        lines = "".join(f"{name}={value!r},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{lines})"

    __repr__ = __str__

    @property
    def device(self) -> torch.device:
        """The device of this process. accelerate numbers CPU devices, and torch.load does not accept such a number as a map_location."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def loss_config(self) -> LossConfig:
        """The settings of the loss. Denominators are those of the whole optimizer step.

        Raises:
            ValueError: the settings of the loss do not fit together.
        """
        return make_loss_config(self)

    def loading_options(self) -> dict[str, Any]:
        """The settings that `load_policy` takes."""
        return {
            "model_init_kwargs": self.model_init_kwargs,
            "trust_remote_code": self.trust_remote_code,
            "half_precision": bool(self.bf16 or self.fp16),
            "gradient_checkpointing": self.gradient_checkpointing,
            "disable_dropout": self.disable_dropout,
        }

    def forward_options(self) -> dict[str, Any]:
        """The settings that `ModelForward` takes."""
        return {
            "share_prompts": self.share_prompts,
            "packing": self.packing,
            "fused_head": self.fused_head,
            "off_policy_mask_threshold": self.off_policy_mask_threshold,
            "rejections": rejections_of(self) if self.bypass_mode else (),
            "logits_dtype": self.logits_dtype,
            "invariant": self.batch_invariant,
        }

    def make_temperature_schedule(self) -> TemperatureSchedule:
        """A new schedule of the temperature; new because a schedule may have a state."""
        return TemperatureSchedule(self._schedule.spec)

    @property
    def sampler_arguments(self) -> dict[str, Any]:
        """``sampler_options`` as a dictionary: TrainingArguments has parsed JSON from a command line, and None is no argument."""
        assert not isinstance(self.sampler_options, str)
        return dict(self.sampler_options or {})

    @property
    def prompt_seed(self) -> int:
        """The seed of the order of the prompts."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts per rollout, over all processes."""
        assert self.generation_batch_size is not None
        return self.generation_batch_size // self.num_generations

    @property
    def minibatches(self) -> int:
        """Optimizer steps of one pass over a rollout."""
        assert self.steps_per_generation is not None
        return self.steps_per_generation // self.gradient_accumulation_steps

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps of all passes over a rollout."""
        return self.minibatches * self.num_iterations
