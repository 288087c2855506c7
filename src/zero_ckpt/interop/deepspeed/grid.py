"""A whole model from its columns: tensor-parallel ranks joined, then pipeline stages one after the other. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from zero_ckpt.interop.deepspeed.column import Column, Group

__all__ = ["stack_stages"]


def stack_stages(stages: Sequence[Column]) -> Column:
    """One column with the parameters of all pipeline stages.

    What several stages hold (tied layers) is taken from the last: each steps its own copy, with moments of its own.
    """
    if len(stages) == 1:
        return stages[0]
    whole = Column(problem=next((s.problem for s in stages if s.problem), ""))
    for stage in stages:
        whole.masters |= stage.masters
        whole.module |= stage.module
        whole.states |= stage.states
        whole.aliases |= stage.aliases
        whole.order += [name for name in stage.order if name not in whole.order]
        whole.buffers |= stage.buffers
        whole.frozen |= stage.frozen
        _add_groups(whole.groups, stage.groups)
    return whole


def _add_groups(groups: list[Group], more: Iterable[Group]) -> None:
    """Groups of equal place are one group, split over the stages."""
    known = {name for group in groups for name in group.names}
    for index, group in enumerate(more):
        names = [name for name in group.names if name not in known]
        if index < len(groups):
            groups[index].names += names
        else:
            groups.append(Group(names, group.options))
