"""YAML that says each thing once."""

from __future__ import annotations

from typing import Any

import yaml


def load_yaml(text: str) -> Any:
    """What YAML says, as plain values.

    Args:
        text: YAML of one document.

    Raises:
        YAMLError: it is broken, or a mapping has a key twice, of which readers drop the first.
    """
    refuse_repeated_keys(text)
    return yaml.safe_load(text)


def refuse_repeated_keys(text: str) -> None:
    """Raise a YAMLError that names the key and both lines when a mapping has a key twice.

    Args:
        text: YAML of one document.
    """
    waiting: list[yaml.Node | None] = [yaml.compose(text, Loader=yaml.SafeLoader)]
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # by an alias, which may lead in a circle
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                waiting.append(value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise yaml.YAMLError(
                        f"the key {key.value!r} is there twice, in lines {lines[key.value]} and {line}; only one of "
                        "them would count: keep one, or put what they hold together"
                    )
                lines[key.value] = line
