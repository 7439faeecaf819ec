"""The loss in other libraries, one module per library. A library is imported, and TRL patched, only when its module is used."""
