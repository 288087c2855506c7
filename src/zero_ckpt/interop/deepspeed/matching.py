"""Finds by order and shapes which of a module's parameters the numbered ones of an optimizer are. Pure.

Each group lists its parameters in the module's order, and each parameter is in one group at most. An assignment counts
only when it is the only one that fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["Ambiguous", "match_shapes"]

Shape = tuple[int, ...]

MAX_STATES = 2_000_000
"""Positions that are tried before the search is given up."""


class Ambiguous(Exception):
    """No assignment fits, or more than one does."""


def match_shapes(
    groups: Sequence[Sequence[Shape | None]], candidates: Mapping[str, Shape]
) -> list[list[str]]:
    """The names of each group's parameters. A shape of None fits any. Raises `Ambiguous`."""
    names = list(candidates)
    if len(groups) == 1 and len(groups[0]) == len(names):
        fits = all(s is None or s == candidates[n] for s, n in zip(groups[0], names, strict=True))
        if fits:
            return [names]
    return _Search(groups, names, [candidates[name] for name in names]).run()


class _Search:
    """Walks the candidates in order: each goes to the next place of one group, or to none."""

    def __init__(
        self,
        groups: Sequence[Sequence[Shape | None]],
        names: Sequence[str],
        shapes: Sequence[Shape],
    ) -> None:
        self._groups, self._names, self._shapes = groups, names, shapes
        self._spare = len(names) - sum(map(len, groups))

    def run(self) -> list[list[str]]:
        if self._spare < 0:
            raise Ambiguous(
                f"{len(self._names)} parameters in the module, {sum(map(len, self._groups))} in the optimizer"
            )
        levels = self._levels()
        goal = tuple(map(len, self._groups))
        if goal not in levels[-1]:
            raise Ambiguous("the optimizer's parameters have other shapes than the module's")
        ways, found, state = 0, [list[str]() for _ in self._groups], goal
        for at in range(len(self._names) - 1, -1, -1):
            options = [
                (before, group) for before, group in self._before(at, state) if before in levels[at]
            ]
            ways = len(options)
            if ways > 1:
                raise Ambiguous(
                    f"the optimizer's parameters have no names, and shapes alone do not tell which is "
                    f"'{self._names[at]}'"
                )
            state, group = options[0]
            if group >= 0:
                found[group].append(self._names[at])
        return [names[::-1] for names in found]

    def _levels(self) -> list[set[tuple[int, ...]]]:
        """For each number of candidates walked: the counts of places filled that can be reached."""
        levels = [{(0,) * len(self._groups)}]
        total = 0
        for at in range(len(self._names)):
            reached = set()
            for state in levels[-1]:
                if at - sum(state) < self._spare:
                    reached.add(state)
                for group, count in enumerate(state):
                    if self._fits(group, count, at):
                        reached.add((*state[:group], count + 1, *state[group + 1 :]))
            total += len(reached)
            if total > MAX_STATES:
                raise Ambiguous(
                    "too many parameters and groups without names to tell which is which"
                )
            levels.append(reached)
        return levels

    def _fits(self, group: int, place: int, at: int) -> bool:
        shapes = self._groups[group]
        return place < len(shapes) and shapes[place] in (None, self._shapes[at])

    def _before(self, at: int, state: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
        """States before candidate `at` from which `state` is one step, and the group that took it (-1: none)."""
        found = [(state, -1)] if at + 1 - sum(state) <= self._spare else []
        for group, count in enumerate(state):
            if count and self._fits(group, count - 1, at):
                found.append(((*state[:group], count - 1, *state[group + 1 :]), group))
        return found
