"""What the package knows of transformers' model classes: the LM head, unwrapping, forward passes, packing."""
