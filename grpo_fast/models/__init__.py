"""What the package knows of transformers' model classes: unwrapping, the LM head, hidden states, forward passes, packing, loading."""
