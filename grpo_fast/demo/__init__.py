"""``grpo-fast demo``: a small language model with bad habits is trained by GRPO in about a minute on one core.

`grpo.py` is the training loop, written to be copied; the other modules are model, warm start, evaluation and report.
"""
