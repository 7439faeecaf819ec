"""``grpo-fast study``: what the temperature does, of a model that samples (`sampling`) and of one that is trained (`training`)."""
