"""Datasets of prompts, and tasks that generate prompts together with the reward that scores their answers."""

from grpo_fast.data.prompts import load_prompts

__all__ = ["load_prompts"]
