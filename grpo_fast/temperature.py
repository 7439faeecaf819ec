"""Temperature schedules, and the diagnosis of a temperature mismatch. The public name of ``grpo_fast.trainer.temperature``."""

from grpo_fast.trainer.temperature import KINDS, Mismatch, TemperatureSchedule, explain_mismatch

__all__ = ["KINDS", "Mismatch", "TemperatureSchedule", "explain_mismatch"]
