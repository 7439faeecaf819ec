"""The Triton kernels, installed as grpo_fast.kernels: torch and triton only, one op per file, described in kernels/README.md."""
