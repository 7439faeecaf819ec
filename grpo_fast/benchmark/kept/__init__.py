"""Suite ``kept`` (``grpo-fast bench-kept``): the head over kept sets against heads that compute the whole vocabulary."""
