"""Suite ``logits`` (``grpo-fast bench``): the loss over logits against other implementations, and against a copy of the same bytes."""
