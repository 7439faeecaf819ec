"""What verl's plugin group names: importing it puts the losses of grpo_fast.integrations.verl into verl's registry."""

from grpo_fast.integrations.verl import register

register()
