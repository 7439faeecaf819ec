"""The YAML of settings files: safe, without duplicate names, and of limited size, so that a hostile or broken file is refused at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from grpo_fast.utils.errors import SettingsError

__all__ = ["SettingsLoader", "check_size"]

MAX_BYTES = 1 << 20
MAX_NODES = 20_000  # names and values, those of every alias counted again: a few lines of aliases of aliases stand for billions
MAX_DEPTH = 32


def check_size(path: Path) -> None:
    """Check the size of a settings file before it is read.

    Raises:
        SettingsError: it has more than a megabyte.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise SettingsError(f"{path} has {size} bytes; expected a settings file, of at most {MAX_BYTES}.")


class SettingsLoader(yaml.SafeLoader):
    """YAML's safe loader with limits, and with an error where a name is set twice; the plain one takes the last value.

    The limits are checked while the document is composed, before any alias is expanded.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._nodes, self._depth = 0, 0
        self._sizes: dict[str, int] = {}  # anchor -> number of nodes that an alias to it expands to

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, and count it."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise yaml.composer.ComposerError(problem=f"{event.anchor} contains itself", problem_mark=event.start_mark)
            self._count(self._sizes.get(event.anchor, 0), event)
            return super().compose_node(parent, index)
        before, self._depth = self._nodes, self._depth + 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(problem=f"it is nested more than {MAX_DEPTH} deep", problem_mark=event.start_mark)
        self._count(1, event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = self._nodes - before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a dictionary, and check its names."""
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, times in names.items():
            if times > 1:
                raise yaml.constructor.ConstructorError(problem=f"{name} is set twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)

    def _count(self, nodes: int, event: yaml.Event) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            problem = f"it has more than {MAX_NODES} names and values, with those that aliases repeat"
            raise yaml.composer.ComposerError(problem=problem, problem_mark=event.start_mark)
