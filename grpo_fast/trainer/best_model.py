"""The metric that chooses the best checkpoint, and that a learning-rate schedule follows: the reward, of which more is better."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo_fast.trainer.config import GRPOConfig

__all__ = ["choose_metric", "choose_mode"]

_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # follow a metric
DEFAULT = "eval_reward"


def choose_metric(config: GRPOConfig) -> None:
    """Set ``metric_for_best_model`` to ``eval_reward`` where it is needed and not set; transformers' own default is the loss.

    Call it before ``TrainingArguments.__post_init__``, which sets ``greater_is_better`` by the name of the metric.
    """
    needed = config.load_best_model_at_end or _value(config.save_strategy) == "best" or _value(config.lr_scheduler_type) in _SCHEDULES
    if needed and config.metric_for_best_model is None:
        config.metric_for_best_model = DEFAULT


def choose_mode(config: GRPOConfig) -> None:
    """Let a schedule that follows a metric look for its maximum if greater is better; its own default is the minimum.

    Call it after ``TrainingArguments.__post_init__``, which parses ``lr_scheduler_kwargs``.
    """
    if _value(config.lr_scheduler_type) in _SCHEDULES and config.greater_is_better:
        given = config.lr_scheduler_kwargs
        config.lr_scheduler_kwargs = {"mode": "max", **(given if isinstance(given, dict) else {})}


def _value(setting: object) -> str:
    return str(getattr(setting, "value", setting))
