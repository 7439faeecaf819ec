"""The module that verl's plugin group names. Its import registers the losses of grpo_fast.integrations.verl."""

from grpo_fast.integrations.verl import register

register()
