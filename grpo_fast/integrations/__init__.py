"""The same loss inside other libraries, one file per library. Nothing is imported or patched before it is asked for."""
