"""The pages of the API: one for each public module, with every name in its `__all__`, documented by mkdocstrings from the docstrings.

The sources are parsed and not imported, so that the site can be built without torch.
"""

from __future__ import annotations

import ast
from pathlib import Path

__all__ = ["MODULES", "pages", "public_names", "titles"]

MODULES = {  # public import name: what a reader finds there
    "grpo_fast": "the loss, the head, advantages and corrections",
    "grpo_fast.trainer": "the trainer and its settings",
    "grpo_fast.temperature": "schedules of the temperature",
    "grpo_fast.rewards": "rule-based rewards",
    "grpo_fast.generation": "samplers",
    "grpo_fast.data": "datasets",
    "grpo_fast.tasks": "tasks that make prompts and answers",
    "grpo_fast.integrations.trl": "the adapter for TRL",
    "grpo_fast.integrations.liger": "the adapter for Liger",
    "grpo_fast.integrations.verl": "the adapter for verl",
    "grpo_fast.integrations.openrlhf": "the adapter for OpenRLHF",
    "grpo_fast.integrations.skyrl": "the adapter for SkyRL",
    "grpo_fast.integrations.prime_rl": "the adapter for prime-rl",
}


def titles() -> dict[str, str]:
    """The file of each page, and its title in the navigation."""
    return {_page(module): module for module in MODULES}


def pages(root: Path) -> dict[str, str]:
    """The file of each page, and its Markdown."""
    return {_page(module): _text(root, module) for module in MODULES}


def public_names(root: Path, module: str) -> list[str]:
    """The names in `__all__` of a module, read from its source.

    Raises:
        ValueError: it has none.
    """
    path = root.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise ValueError(f"{source} has no list __all__. Fix: name its public names there.")


def _page(module: str) -> str:
    return f"api/{module}.md"


def _text(root: Path, module: str) -> str:
    options = {"members": "false", "show_root_heading": "false", "show_root_toc_entry": "false"}  # only the module's own docstring
    parts = [f"# {module}\n\n::: {module}", "    options:", *(f"      {name}: {value}" for name, value in options.items()), ""]
    parts += [f"::: {module}.{name}\n" for name in public_names(root, module)]
    return "\n".join(parts)
