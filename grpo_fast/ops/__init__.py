"""Operators: schemas, fake implementations and autograd; the backends that implement them; building and loading of the extension."""
