"""A YAML file of options: each mistake is reported with its line, before the parser sees the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from steel_megatron.cli.options import Option, entry_of, find, list_part
from steel_megatron.cli.suggestions import did_you_mean
from steel_megatron.config.loading import YamlLoader, described, is_a
from steel_megatron.errors import ConfigError


def read_settings(path: str, settings: Mapping[str, Option], section: str = "") -> dict[str, Any]:
    """Read a file of options.

    Args:
        path: the file.
        settings: the options of the command by dotted name.
        section: the section that the file holds; empty for a whole command.

    Returns:
        the values by dotted name; a single value stands for a list of one.

    Raises:
        ConfigError: the file cannot be read or is empty, names an option twice or one that does not exist, or has a
            value of a wrong type.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the settings file {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    return settings_in(text, path, settings, section)


def settings_in(text: str, origin: str, settings: Mapping[str, Option], section: str) -> dict[str, Any]:
    """The options in a YAML text.

    Args:
        text: the text.
        origin: where it comes from, for messages.
        settings: the options of the command by dotted name.
        section: the section that the text holds; empty for a whole command.

    Raises:
        ConfigError: as for :func:`read_settings`.
    """
    file = _File(origin, settings)
    try:
        loader = YamlLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise ConfigError(f"{origin} is empty; it must hold options, one a line, such as {_example(settings)}")
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError(f"{origin} holds no options; it must have lines such as {_example(settings)}")
            file.take(loader, node, f"{section}." if section else "")
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error
    return file.values


def _example(settings: Mapping[str, Option]) -> str:
    return f"'{next(iter(settings), 'name')}: VALUE'"


@dataclass
class _File:
    path: str
    settings: Mapping[str, Option]
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def take(self, loader: YamlLoader, node: yaml.MappingNode, prefix: str) -> None:
        """Take the options of a section.

        Args:
            loader: makes values of nodes.
            node: the section.
            prefix: its name and a dot; empty for the whole file.
        """
        loader.flatten_mapping(node)  # <<: *anchor
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            name = f"{prefix}{loader.construct_object(key_node, deep=True)}"
            if name in self.lines:
                raise self.error(
                    line, f"{name} is given twice, first in line {self.lines[name]}; leave one of them out"
                )
            self.lines[name] = line
            if any(known.startswith(f"{name}.") for known in self.settings):
                if isinstance(value_node, yaml.MappingNode):
                    self.take(loader, value_node, f"{name}.")
                elif (value := loader.construct_object(value_node, deep=True)) is not None:
                    raise self.error(line, f"{name} is {value!r}; it is a section with options of its own")
            elif (option := find(self.settings, name)) is None:
                raise self.error(line, f"there is no option {name}{did_you_mean(name, self.settings)}")
            else:
                self.values[name] = self._checked(
                    name, loader.construct_object(value_node, deep=True), option.kind, line
                )

    def _checked(self, name: str, value: object, kind: Any, line: int) -> object:
        """A value of the option's type."""
        if (converted := _converted(value, kind)) is not None:
            return converted
        if value is None and is_a(None, kind):
            return None
        quoted = "; put it into quotes" if is_a("", kind) and not isinstance(value, (list, dict)) else ""
        raise self.error(line, f"{name} is {value!r}; it must be {described(kind)}{quoted}")

    def error(self, line: int, message: str) -> ConfigError:
        return ConfigError(f"{self.path}, line {line}: {message}")


def _converted(value: object, kind: Any) -> object:
    """A value as its option has it; None if it cannot be."""
    if is_a(value, kind):
        return value
    entry = entry_of(kind)
    if isinstance(value, dict) and entry is not None and list_part(entry) is not None:
        value = {name: [one] if isinstance(one, str) else one for name, one in value.items()}
        return value if is_a(value, kind) else None
    if list_part(kind) is not None and is_a([value], list_part(kind)):
        return [value]
    if isinstance(value, str) and not is_a("", kind):
        try:
            read = yaml.load(value, YamlLoader)
        except yaml.YAMLError:
            return None
        return read if is_a(read, kind) else None
    return None
