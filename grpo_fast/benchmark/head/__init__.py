"""``grpo-fast bench-head``: the fused head against what else computes a loss from hidden states, and against its bare matrix products."""
