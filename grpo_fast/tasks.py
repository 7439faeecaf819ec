"""Tasks: generated prompts with the reward that scores their answers. The public name of ``grpo_fast.data.tasks``."""

from grpo_fast.data.tasks import INSTRUCTION, ReasoningGymReward, Task, arithmetic_task, reasoning_gym_task, sorting_task

__all__ = ["INSTRUCTION", "ReasoningGymReward", "Task", "arithmetic_task", "reasoning_gym_task", "sorting_task"]
