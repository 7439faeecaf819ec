"""What this package replaces or relies on in other libraries, for the probe of a version that it was not compared with.

For each distribution, file and name, one of

    SOURCE           replaced, or its arithmetic is ours: the signature and the source must be the same
    SIGNATURE        called, or called by the library's own code: only the signature must be the same
    names, a tuple   its results are read: the signature must be the same, and its source must still hold these names

A name is a function, ``Class``, ``Class.method``, or ``Class.field`` of a dataclass, whose source is its default. After a change here, run
``python tools/generate_peer_digests.py``.
"""

from __future__ import annotations

__all__ = ["RELIED_ON", "SIGNATURE", "SOURCE", "Parts"]

SOURCE, SIGNATURE = "source", "signature"
Parts = dict[str, dict[str, "str | tuple[str, ...]"]]  # file -> name -> what must be the same


def _fields(of: str, names: str) -> dict[str, str | tuple[str, ...]]:
    return {f"{of}.{name}": SOURCE for name in names.split()}


RELIED_ON: dict[str, Parts] = {
    "trl": {
        "trl/trainer/grpo_trainer.py": {
            "GRPOTrainer._compute_loss": SOURCE,
            "GRPOTrainer.compute_loss": SOURCE,
            "GRPOTrainer.get_off_policy_mask": SOURCE,
            "GRPOTrainer.get_gamma_weights": SOURCE,
            "GRPOTrainer.get_high_entropy_mask": SOURCE,
            "GRPOTrainer.training_step": SIGNATURE,
            "GRPOTrainer.prediction_step": SIGNATURE,
            "GRPOTrainer.log": ("self._metrics",),
            "GRPOTrainer.__init__": (
                "self.temperature", "self.beta", "self.epsilon_low", "self.epsilon_high", "self.loss_type", "self.entropy_coef",
                "self.use_adaptive_entropy", "self.generation_kwargs", "self._metrics", "self.importance_sampling_level",
                "self.top_entropy_quantile", "self.off_policy_mask_threshold",
            ),
            "GRPOTrainer._generate_and_score_completions": (
                "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch",
                "old_per_token_logps", "ref_per_token_logps", "importance_sampling_ratio", "sampling_per_token_logps", "tool_mask",
            ),
        },
        "trl/trainer/utils.py": {
            "FusedCausalLMOutput": SOURCE,
            "add_fused_lm_head": SOURCE,
        },
        "trl/kernels/chunked_logprob.py": {
            "_use_triton": SIGNATURE,
            "ChunkedLogProbFunction.forward": SIGNATURE,
        },
        "trl/trainer/grpo_config.py": _fields(
            "GRPOConfig",
            "temperature beta epsilon epsilon_high delta loss_type importance_sampling_level use_bias_correction_kl sapo_temperature_pos "
            "sapo_temperature_neg vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg entropy_coef use_adaptive_entropy "
            "top_entropy_quantile off_policy_mask_threshold vllm_importance_sampling_correction cast_lm_head_to_fp32",
        ),
    },
    "liger-kernel": {
        "liger_kernel/chunked_loss/grpo_loss.py": {
            "k3_loss_fn": SOURCE,
            "get_gamma_weights": SOURCE,
            "sapo_loss_fn": SOURCE,
            "clip_coef_fn": SOURCE,
            "LigerFusedLinearGRPOFunction.ppo_loss_fn": SOURCE,
            "LigerFusedLinearGRPOLoss.__init__": SOURCE,
            "LigerFusedLinearGRPOLoss.forward": SOURCE,
        },
        "liger_kernel/chunked_loss/fused_linear_ppo.py": {
            "LigerFusedLinearPPOBase.forward": SIGNATURE,
            "LigerFusedLinearPPOBase._compute_dapo_normalizer": SOURCE,
        },
        "liger_kernel/transformers/grpo_loss.py": {
            "triton_grpo_loss": SOURCE,
            "_reduce_grpo_loss": SOURCE,
            "_masked_mean": SOURCE,
        },
        "liger_kernel/ops/grpo_loss.py": {"GrpoLossFunction.forward": SIGNATURE},
    },
    "verl": {
        "verl/trainer/ppo/core_algos.py": {
            "register_policy_loss": SOURCE,
            "register_adv_est": SOURCE,
            "agg_loss": SOURCE,
            "compute_policy_loss_vanilla": SOURCE,
            "compute_policy_loss_gspo": SOURCE,
            "compute_policy_loss_sapo": SOURCE,
            "compute_policy_loss_cispo": SOURCE,
            "compute_policy_loss_gpg": SOURCE,
            "compute_grpo_outcome_advantage": SOURCE,
        },
        "verl/workers/config/actor.py": _fields(
            "ActorConfig", "clip_ratio clip_ratio_low clip_ratio_high clip_ratio_c loss_agg_mode loss_scale_factor tau_pos tau_neg"
        ),
        "verl/utils/kernel/linear_cross_entropy.py": {"LinearCrossEntropy.forward": SIGNATURE},
    },
    "openrlhf": {
        "openrlhf/models/loss.py": {"aggregate_loss": SOURCE, "PolicyLoss.__init__": SOURCE, "PolicyLoss.forward": SOURCE},
    },
    "ms-swift": {
        "swift/rlhf_trainers/grpo_trainer.py": {
            "GRPOTrainer._compute_loss_and_metrics": SOURCE,
            "GRPOTrainer._undo_gradient_accumulation_scaling": SOURCE,
            "GRPOTrainer._apply_rollout_importance_sampling": SOURCE,
            "GRPOTrainer._compute_sequence_level_ratios": SOURCE,
        },
    },
    "vllm": {  # spoken to over HTTP, but for the transfer of weights by NCCL: looked at by the nightly run, not at import
        "vllm/distributed/weight_transfer/factory.py": {"WeightTransferTrainerFactory.trainer_init": SIGNATURE},
        "vllm/distributed/weight_transfer/base.py": {
            "ModuleSource.__init__": SIGNATURE,
            "TrainerWeightTransferEngine.send_weights": SIGNATURE,
            "TrainerWeightTransferEngine.shutdown": SIGNATURE,
        },
        "vllm/distributed/weight_transfer/clients.py": {"HTTPVLLMWeightSyncClient.__init__": SIGNATURE},
        "vllm/distributed/weight_transfer/nccl_engine.py": {"NCCLTrainerInitInfo": SIGNATURE},
    },
}  # fmt: skip
