"""``grpo-fast study``: the effect of the temperature on sampling (`sampling`) and on training (`training`).

Each study has one module that checks its settings (``*_setup``), one that measures, and one that summarizes (``*_summary``).
"""
