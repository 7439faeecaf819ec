"""What rewards log: ``log_metric(name, value)`` for the metrics of the step, ``log_extra(column, values)`` for the table of completions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from grpo_fast.rewards import RewardError

if TYPE_CHECKING:
    from grpo_fast.trainer.metrics import MetricAccumulator

__all__ = ["RewardLog"]

# Names of the trainer's own metrics, with which a reward's would be averaged.
_OWN = re.compile(
    r"(loss|reward|reward_std|reward_std_all|reward_std_group|entropy|entropy_coef|kl|learning_rate|grad_norm|epoch|step|temperature|num_tokens|tokens_per_second|active_fraction"
    r"|aux_loss|off_policy_masked|cispo_clip_ratio|step_time|frac_reward_zero_std|(rewards|completions|clip_ratio|ratio|sampling|step_time|dynamic_sampling)/.*|eval_.*)"
)


class RewardLog:
    """Receives what the rewards of one batch log, and checks it where they call, so that the error names the reward.

    Args:
        metrics: of the step; the metrics of rewards are added to them.
        count: completions in the batch.
    """

    def __init__(self, metrics: MetricAccumulator, count: int) -> None:
        self.metrics, self.count = metrics, count
        self.columns: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: Any) -> None:
        """Add a value to the mean of a metric.

        Raises:
            TypeError: the name is no text, or the value no number.
            ValueError: the trainer has a metric of this name.
        """
        if not isinstance(name, str):
            raise TypeError(f"log_metric: name is {name!r} ({type(name).__name__}); expected a text.")
        if _OWN.fullmatch(name):
            raise ValueError(f"log_metric: name is {name!r}, which is a metric of the trainer; expected another. Fix: 'my/{name}'.")
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"log_metric: the value of {name!r} is a {type(value).__name__}; expected one number.") from error
        self.metrics.add_mean(name, number)

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Set a column of the table of completions, one value per completion; several calls of one batch continue it.

        Raises:
            TypeError: the column's name is no text, or the values are no list.
        """
        if not isinstance(column, str):
            raise TypeError(f"log_extra: column is {column!r} ({type(column).__name__}); expected a text.")
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise TypeError(f"log_extra: the values of {column!r} are a {type(values).__name__}; expected a list, one per completion.")
        self.columns.setdefault(column, []).extend(values.tolist() if hasattr(values, "tolist") else values)

    def rows(self) -> list[dict[str, Any]]:
        """The values of each completion, by column.

        Raises:
            RewardError: a column has another number of values than there are completions.
        """
        for column, values in self.columns.items():
            if len(values) != self.count:
                raise RewardError(
                    f"log_extra({column!r}, ...) was given {len(values)} values for {self.count} completions; expected one for each, "
                    "from one reward."
                )
        return [{column: values[i] for column, values in self.columns.items()} for i in range(self.count)]
