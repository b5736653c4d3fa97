"""Plans few rows of a table of choices in which everything meets that has to meet: a greedy covering array."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

Row = dict[str, str]
"""A value for each factor, in the factors' order."""
Goal = tuple[tuple[str, str], ...]
"""One or two values as ``(factor, value)``, in the factors' order, that have to be together in some row."""
CHANGES = 2
"""Other values that a value may need to be valid, such as a tensor-parallel size."""


def goals_of(factors: Mapping[str, Sequence[str]], strength: int) -> Iterator[Goal]:
    """Every combination of values of ``strength`` factors."""
    for names in itertools.combinations(factors, strength):
        for values in itertools.product(*(factors[name] for name in names)):
            yield tuple(zip(names, values, strict=True))


def met(row: Row) -> Iterator[Goal]:
    """The goals that a row meets."""
    for strength in (1, 2):
        yield from itertools.combinations(row.items(), strength)


class Planner:
    """Finds rows. The same input gives the same rows.

    Args:
        factors: the values of each factor; the first one is neutral.
        cost: of a row, to choose the cheaper of two; None if it is not valid.
        tries: rows of which the best one is taken, each time.
    """

    def __init__(
        self, factors: Mapping[str, Sequence[str]], cost: Callable[[Row], float | None], tries: int = 8
    ) -> None:
        self.factors, self.tries, self._cost = factors, tries, cost
        self._rows: dict[Goal, Row | None] = {}
        self._costs: dict[tuple[str, ...], float | None] = {}

    def cost(self, row: Row) -> float | None:
        """What a row costs; None if it is not valid."""
        key = tuple(row.values())
        if key not in self._costs:
            self._costs[key] = self._cost(row)
        return self._costs[key]

    def cover(self, goals: Iterable[Goal]) -> tuple[list[Row], list[Goal]]:
        """Rows that meet all goals that can be met.

        Returns:
            the rows, and the goals that no valid row meets.
        """
        left, rows, impossible = dict.fromkeys(goals), [], []
        while left:
            found: list[tuple[int, float, Row]] = []
            for goal in list(itertools.islice(left, self.tries)):
                row = self._with(goal)
                if row is None:
                    impossible.append(goal)
                    del left[goal]
                else:
                    found.append(self._improved(row, goal, left))
            if found:
                rows.append(max(found, key=lambda one: (one[0], -one[1]))[2])
                for goal in met(rows[-1]):
                    left.pop(goal, None)
        return rows, impossible

    def _with(self, goal: Goal) -> Row | None:
        """A valid row that meets the goal, near to the neutral one."""
        if goal in self._rows:
            return self._rows[goal]
        neutral = {name: values[0] for name, values in self.factors.items()}
        row, changes = neutral | dict(goal), CHANGES
        if len(goal) > 1 and self.cost(row) is None:
            # What each of the values needs by itself; together they seldom need anything else.
            alone = [self._with((value,)) for value in goal]
            if None in alone:
                return None
            row, changes = neutral, 1
            for one in alone:
                row = row | {name: value for name, value in (one or {}).items() if value != neutral[name]}
            row |= dict(goal)
        others = [name for name in self.factors if name not in dict(goal)]
        self._rows[goal] = next(self._changed(row, others, changes), None)
        return self._rows[goal]

    def _changed(self, row: Row, names: Sequence[str], most: int) -> Iterator[Row]:
        """The valid rows that differ from one in up to ``most`` factors of ``names``, the nearest first."""
        for count in range(most + 1):
            for some in itertools.combinations(names, count):
                for values in itertools.product(*(self.factors[name] for name in some)):
                    changed = row | dict(zip(some, values, strict=True))
                    if self.cost(changed) is not None:
                        yield changed

    def _improved(self, row: Row, goal: Goal, left: Mapping[Goal, None]) -> tuple[int, float, Row]:
        """Change one value after the other as long as the row meets more, or costs less."""
        fixed, cost, again = dict(goal), self.cost(row), True
        assert cost is not None
        while again:
            again = False
            for name, values in self.factors.items():
                for value in values if name not in fixed else ():
                    changed = row | {name: value}
                    more = self._met_by(changed, name, left) - self._met_by(row, name, left)
                    if more < 0 or (other := self.cost(changed)) is None or (more == 0 and other >= cost):
                        continue
                    row, cost, again = changed, other, True
        return sum(one in left for one in met(row)), cost, row

    @staticmethod
    def _met_by(row: Row, name: str, left: Mapping[Goal, None]) -> int:
        """How many goals the row meets by its value of one factor."""
        own, after, count = (name, row[name]), False, ((name, row[name]),) in left
        for other in row.items():
            if other[0] == name:
                after = True
            else:
                count += ((own, other) if after else (other, own)) in left
        return int(count)
