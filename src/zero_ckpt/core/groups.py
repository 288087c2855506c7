"""Options of an optimizer's parameter groups, from those that were saved: matched by the parameters' names.

A group gets the options under which its own parameters were saved, wherever they were grouped then; never those of
another group. Changes nothing but in `take_options`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from zero_ckpt.errors import StateMismatchError

__all__ = ["check_same_parameters", "matched_options", "take_options"]

Groups = Sequence[tuple[list[str], dict[str, Any]]]
"""FQNs and options of each live group, as `state.group_names` gives them."""
Saved = Sequence[Mapping[str, Any]]
"""`params` and `options` of each saved group."""


def check_same_parameters(path: str, groups: Groups, saved: Saved) -> None:
    """Raises `StateMismatchError` when the optimizer has other parameters than the checkpoint at `path`."""
    home = {fqn for group in saved for fqn in group["params"]}
    live = {fqn for fqns, _ in groups for fqn in fqns}
    new, gone = sorted(live - home), sorted(home - live)
    if new or gone:
        parts = [f"not in the checkpoint: {_names(new)}"] if new else []
        parts += [f"only in the checkpoint: {_names(gone)}"] if gone else []
        raise StateMismatchError(
            f"{path}: the optimizer has other parameters than when it was saved: {'; '.join(parts)}. No optimizer was "
            "changed. Give it the same parameters, or load with load_optimizer_states=False."
        )


def matched_options(path: str, groups: Groups, saved: Saved) -> list[Mapping[str, Any]]:
    """For each live group the saved options of its parameters. Their names are the same (`check_same_parameters`).

    Raises `StateMismatchError` for a group that joins parameters which were saved with different options.
    """
    home = {fqn: index for index, group in enumerate(saved) for fqn in group["params"]}
    matched = []
    for index, (fqns, options) in enumerate(groups):
        homes = sorted({home[fqn] for fqn in fqns})
        found = [saved[i]["options"] for i in homes] or (
            [saved[index]["options"]] if index < len(saved) else [options]
        )
        if any(not _same(found[0], other) for other in found[1:]):
            raise StateMismatchError(
                f"{path}: parameter group {index} joins parameters of the saved groups {homes}, whose options "
                "differ. No optimizer was changed. Group the parameters as they were, keep the new options with "
                "override_hyperparameters=True, or load with load_optimizer_states=False."
            )
        matched.append(found[0])
    return matched


def take_options(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Give a live group the saved options. A live tensor (a capturable learning rate) stays the same object, filled."""
    for name, value in saved.items():
        live = group.get(name)
        if isinstance(live, torch.Tensor) and not isinstance(live, nn.Parameter):
            live.fill_(float(value))
        elif isinstance(value, torch.Tensor) and isinstance(live, (int, float)):
            group[name] = type(live)(value.item())
        else:
            group[name] = value


def _names(keys: Sequence[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys)


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.equal(*(torch.as_tensor(x, device="cpu") for x in (a, b)))
    return bool(a == b)
