"""The Triton kernels, installed as grpo_fast.kernels: torch and triton only, one op per file. README.md beside this folder describes each."""
