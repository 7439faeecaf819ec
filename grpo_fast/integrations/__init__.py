"""Adapters that put the loss into other libraries, one module per library. A library is imported only when its module is imported."""
