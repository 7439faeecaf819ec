"""Tasks: prompts that are generated together with the reward that scores their answers, by rule.

A task holds rows and a reward: ``GRPOTrainer(model, task.reward, train_dataset=task.rows)``. One file per family of tasks.
"""

from grpo_fast.data.tasks.arithmetic import arithmetic_task
from grpo_fast.data.tasks.common import INSTRUCTION, Task
from grpo_fast.data.tasks.reasoning_gym import ReasoningGymReward, reasoning_gym_task
from grpo_fast.data.tasks.sorting import sorting_task

__all__ = ["INSTRUCTION", "ReasoningGymReward", "Task", "arithmetic_task", "reasoning_gym_task", "sorting_task"]
