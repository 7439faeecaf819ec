"""``grpo-fast bench``: the loss against what you would use instead, and against a copy of the same bytes.

settings.py   what is measured: shapes, types, options, and the errors of bad ones
arena.py      memory that the benchmark's processes share
data.py       the batch that every contestant gets, and what float64 says of it
contestants.py, trl_contestant.py       who is measured
gate.py       no number for a wrong result
measure.py    one repetition: cold caches, clocks, peak memory
worker.py     a child process that holds contestants and does what it is told
schedule.py   starts the children and interleaves their repetitions
overhead.py   what a small call costs, and where
machine.py    on what it was measured
report.py, plot.py                      tables, JSON, figure
cli.py        the command
"""
