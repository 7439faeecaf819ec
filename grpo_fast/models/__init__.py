"""All code that depends on transformers' model classes: unwrapping, the LM head, hidden states, forward passes, packing, loading."""
