"""The options of TRL's GRPOConfig that this package's GRPOTrainer supports."""

from __future__ import annotations

import dataclasses

import trl
from transformers import TrainingArguments

__all__ = ["refuse_unknown_options"]

_READ_HERE = {
    "temperature", "beta", "epsilon", "epsilon_high", "delta", "loss_type", "importance_sampling_level", "use_bias_correction_kl",
    "max_completion_length",
    "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
    "entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target",
    "top_entropy_quantile", "off_policy_mask_threshold", "vllm_importance_sampling_correction", "steps_per_generation",
    "cast_lm_head_to_fp32", "router_aux_loss_coef",
}  # fmt: skip
_READ_BY_TRL = {  # of generation, rewards, advantages and logging: the code before the loss and after it
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


def refuse_unknown_options(args: trl.GRPOConfig) -> None:
    """Raise a ValueError for an option of GRPOConfig that is not at its default and is read neither by this package nor by TRL's code."""
    known = {*_READ_HERE, *_READ_BY_TRL, *(field.name for field in dataclasses.fields(TrainingArguments))}
    for field in dataclasses.fields(trl.GRPOConfig):
        if field.name not in known and getattr(args, field.name) != field.default:
            raise ValueError(
                f"GRPOTrainer: {field.name} is {getattr(args, field.name)!r}; expected its default, {field.default!r}: this option of "
                "GRPOConfig is not known here, and would have no effect. Leave it out, or use TRL's own trainer."
            )
