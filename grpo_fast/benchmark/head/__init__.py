"""Suite ``head`` (``grpo-fast bench-head``): the fused head against other implementations, and against its bare matrix products."""
