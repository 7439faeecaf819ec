"""Temperature schedules, and the diagnosis of a temperature mismatch. The public names of ``grpo_fast.trainer.temperature``."""

from grpo_fast.trainer.temperature import KINDS, TemperatureSchedule
from grpo_fast.trainer.temperature_mismatch import Mismatch, explain_mismatch

__all__ = ["KINDS", "Mismatch", "TemperatureSchedule", "explain_mismatch"]
