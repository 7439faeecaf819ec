"""The language-model head by chunks of tokens: loss and log-probabilities from hidden states, with no more logits alive than a chunk's."""
