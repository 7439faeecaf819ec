"""The benchmarks: ``grpo-fast bench``, and ``bench-`` with ``head``, ``kept``, ``trainer``, ``trl``, ``step`` and ``drop-ins``.

harness/          what all suites share: settings, worker processes, clocks and memory, gates, result files, tables, figures
eager.py          the loss in plain PyTorch: the baseline and, in float64, the truth
logits/           suite of the loss over logits
head/             suite of the fused LM head
trainer_stage.py, trl_stage.py: suites of trainers' loss stages; the second takes model and batch from the first
step/             suite of whole training steps
drop_ins.py       suite of what the guides replace
"""
