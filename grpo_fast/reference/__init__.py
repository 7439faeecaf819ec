"""The whole specification in plain PyTorch: the truth of every test, and the backend that runs anywhere."""

from grpo_fast.reference.loss import Policy, Sequences, aggregation_weights, policy_loss, token_statistics

__all__ = ["Policy", "Sequences", "aggregation_weights", "policy_loss", "token_statistics"]
