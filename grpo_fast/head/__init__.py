"""The fused LM head: loss and log-probabilities from hidden states, with the logits of one chunk of tokens in memory at a time."""
