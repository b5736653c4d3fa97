"""The words of a command line, brought into the one form that the parser reads.

Lists are written with or without brackets, switches with or without ``true``, arguments with or without their names,
and options come from files as well as from words; of all that, :func:`normalized` makes ``--name=value``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from steel_megatron.cli.options import REQUIRED, Option, find, list_part
from steel_megatron.cli.settings_file import read_settings, settings_in
from steel_megatron.cli.suggestions import did_you_mean
from steel_megatron.config.loading import YamlLoader, described, is_a
from steel_megatron.errors import ConfigError
from steel_megatron.log import get_logger

logger = get_logger(__name__)

_SWITCHES = ("true", "false", "yes", "no", "on", "off", "null")
_TEXTS = ("prompts", "stop")
"""Lists whose values may begin with a bracket."""


def normalized(words: Sequence[str], settings: Mapping[str, Option], positional: Sequence[str]) -> list[str]:
    """The words as options ``--name=value``.

    Args:
        words: what follows the command.
        settings: its options by dotted name.
        positional: names of those that may be given without a name, in order; a list takes all further words.

    Raises:
        ConfigError: an option does not exist, has no value, or is missing; a word belongs to no option; or a settings
            file is wrong.
    """
    line = _Line(settings, list(words))
    while line.left:
        line.take()
    line.assign(positional)
    missing = [name for name, option in settings.items() if option.default is REQUIRED and name not in line.given]
    if missing and not line.printing:
        needed = ", ".join(f"{_shown(name, positional)} ({settings[name].help.rstrip('.')})" for name in missing)
        raise ConfigError(f"not given: {needed}")
    return line.normal


def _shown(name: str, positional: Sequence[str]) -> str:
    return name.upper() if name in positional else f"--{name}"


@dataclass
class _Line:
    settings: Mapping[str, Option]
    left: list[str]
    normal: list[str] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    """The last value of each option; lists with all of their values since the last file."""
    loose: list[str] = field(default_factory=list)
    """Words that belong to no option: positional arguments."""
    printing: bool = False

    def take(self) -> None:
        """Take the next word, and what belongs to it."""
        word = self.left.pop(0)
        name, equals, value = word[2:].partition("=")
        if word == "--":
            self.loose += self.left
            self.left = []
        elif not word.startswith("--"):
            self.loose.append(word)
        elif name == "print_config":
            self.printing = True
            self.normal.append(word)
        elif name == "config":
            self.take_file(value if equals else self.value_of("--config", "a YAML file"))
        else:
            self.take_option(name, [value] if equals else None)

    def take_file(self, path: str) -> None:
        """Take the options of a file, or of YAML in braces, in place of the word."""
        if path.startswith("{"):
            self.take_settings(settings_in(path, "--config", self.settings, ""))
        else:
            self.take_settings(read_settings(path, self.settings))

    def take_section(self, name: str, value: str) -> None:
        """Take the options of a section from a file, or from YAML in braces."""
        if value.startswith("{"):
            self.take_settings(settings_in(value, f"--{name}", self.settings, name))
        else:
            self.take_settings(read_settings(value, self.settings, name))

    def take_settings(self, found: dict[str, Any]) -> None:
        """Take several options in place of the word that stands for them."""
        self.given |= dict.fromkeys(found)  # lists begin anew
        nested: dict[str, Any] = {}
        for name, value in found.items():
            *sections, last = name.split(".")
            section = nested
            for one in sections:
                section = section.setdefault(one, {})
            section[last] = value
        self.normal.append(f"--config={json.dumps(nested, ensure_ascii=False)}")

    def take_option(self, written: str, values: list[str] | None) -> None:
        """Take an option and its values."""
        name, plus = written.removesuffix("+"), "+" if written.endswith("+") else ""
        option = find(self.settings, name)
        if option is None and (option := find(self.settings, name.replace("-", "_"))) is not None:
            name = name.replace("-", "_")
        if option is None and any(known.startswith(f"{name}.") for known in self.settings):
            self.take_section(name, values[0] if values else self.value_of(f"--{name}", "a YAML file, or '{...}'"))
            return
        if option is None:
            raise ConfigError(f"there is no option --{name}{did_you_mean(name, self.settings, '--')}")
        entry = list_part(option.kind)
        if entry is not None:
            found = self._list_of(f"--{written}", option, values, name in _TEXTS)
            if isinstance(found, str):  # a dictionary, or null
                self.normal.append(f"--{name}={found}")
                return
            before = self.given.get(name)
            self.given[name] = [*(before if isinstance(before, list) and not plus else []), *found]
            self.normal.append(f"--{name}{plus}={json.dumps(found if plus else self.given[name], ensure_ascii=False)}")
            return
        if plus:
            raise ConfigError(f"--{written} adds to a list, but {name} is {described(option.kind)}")
        if values is None:
            values = [self.switch() if option.kind is bool else self.value_of(f"--{name}", described(option.kind))]
        if not values[0] and not is_a("", option.kind):
            raise ConfigError(f"--{name} has no value; it must be {described(option.kind)}")
        self.note(name, values[0])
        self.normal.append(f"--{name}={values[0]}")

    def note(self, name: str, value: str) -> None:
        """Remember an option's value, and tell of one that replaces another word's."""
        before = self.given.get(name)
        if isinstance(before, _Word) and before != value:
            logger.warning(f"--{name} is given twice: {value} is taken, not {before}")
        self.given[name] = _Word(value)

    def switch(self) -> str:
        """The value of an option that is on or off: ``true`` unless the next word says otherwise."""
        return self.left.pop(0) if self.left and self.left[0].lower() in _SWITCHES else "true"

    def value_of(self, option: str, wanted: str) -> str:
        """The next word."""
        if not self.left or self.left[0].startswith("--"):
            raise ConfigError(f"{option} has no value; it must be {wanted}")
        return self.left.pop(0)

    def _list_of(self, written: str, option: Option, values: list[str] | None, is_text: bool) -> list[Any] | str:
        """The values of a list, written as words, or as YAML with brackets; or a dictionary, or null, as it is."""
        kind = option.kind
        if values is None:
            values = []
            while self.left and not self.left[0].startswith("--"):
                values.append(self.left.pop(0))
        if not values:
            raise ConfigError(f"{written} has no value; it must be one or several")
        if len(values) == 1 and ((values[0] == "null" and is_a(None, kind)) or _is_dictionary(values[0], kind)):
            return values[0]
        return [entry for word in values for entry in _entries(word, list_part(kind), written, is_text)]

    def assign(self, positional: Sequence[str]) -> None:
        """Give the words without a name their names."""
        for name in positional:
            if not self.loose:
                return
            if list_part(self.settings[name].kind) is None:
                self.note(name, word := self.loose.pop(0))
                self.normal.append(f"--{name}={word}")
            else:
                found = [entry for word in self.loose for entry in _entries(word, list[str], name, False)]
                self.loose, self.given[name] = [], found
                self.normal.append(f"--{name}={json.dumps(found, ensure_ascii=False)}")
        if self.loose:
            raise ConfigError(f"{self.loose[0]!r} belongs to no option")


class _Word(str):
    """A value that a word gave, not a file."""


def _is_dictionary(word: str, kind: Any) -> bool:
    return word.startswith("{") and is_a({}, kind)


def _entries(word: str, kind: Any, option: str, is_text: bool) -> list[Any]:
    """The entries of a list that a word stands for: one, or those within brackets."""
    text = is_a([""], kind)
    read: object = word
    if not text or (word.startswith("[") and not is_text):
        try:
            read = yaml.load(word, YamlLoader)
        except (yaml.YAMLError, RecursionError):
            read = word  # a pattern such as [ab]*.jsonl
    entries = read if isinstance(read, list) else [word if text else read]
    if not is_a(entries, kind):
        raise ConfigError(f"{option} has {word!r}; it must be {described(kind)}")
    return entries
