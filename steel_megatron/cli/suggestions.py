"""What somebody meant who mistyped a name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, names: Iterable[str], prefix: str = "") -> str:
    """The end of a message: ``; did you mean model.hidden_size?``, or nothing if no name is close.

    Args:
        word: what was written.
        names: what there is; a name whose last part is the word counts as close.
        prefix: put before each name, such as ``--``.
    """
    known = list(names)
    last = word.rpartition(".")[2].replace("-", "_")
    alike = [name for name in known if name.rpartition(".")[2] == last]
    last_parts = {name.rpartition(".")[2]: name for name in known}
    close = difflib.get_close_matches(word.replace("-", "_") if prefix else word, known, 3, 0.7)
    of_last = [last_parts[part] for part in difflib.get_close_matches(last, last_parts, 2, 0.8)]
    found = list(dict.fromkeys([*alike, *close, *of_last]))[:3]
    return f"; did you mean {' or '.join(prefix + name for name in found)}?" if found else ""
