"""A machine that executes PTX, the assembly language of NVIDIA's GPUs, on a CPU; tests/ptx_machine.py describes it."""
