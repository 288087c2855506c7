"""Lightning's checkpoint dict <-> what the core stores.

On disk a checkpoint of Lightning's is laid out like one of `zero_ckpt.Checkpointer`, so that each
opens the other's: weights under their names, optimizer state under `<parameter>/<state>`, and the
objects `optimizers`, `lr_schedulers`, `extra_state`, `global_step` and `client_state`, which is all
the rest of Lightning's dict. Whatever hooks have left in the dict is what is stored.

A dict read back holds lazy tensors; nothing but objects is read from disk until they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from zero_ckpt.core.binding import named, prefix_of
from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.computed import is_extra_state
from zero_ckpt.core.custom import lazy_state_dict
from zero_ckpt.core.dtensors import TORCH_DTYPES, local_tensor
from zero_ckpt.core.lazy import LazyTensor
from zero_ckpt.core.naming import Naming, naming_of
from zero_ckpt.core.objects import decode_objects
from zero_ckpt.core.state import Snapshot, by_parameter
from zero_ckpt.core.state_values import add_value, python_value, split_state_name
from zero_ckpt.lightning.optimizers import pruned_names, rest_of

__all__ = ["VERSION_KEY", "ModuleNames", "from_checkpoint", "step_of", "to_snapshot"]

VERSION_KEY = "pytorch-lightning_version"
"""Marks a dict as Lightning's; Lightning refuses one without."""


@dataclass(frozen=True, slots=True)
class ModuleNames:
    """What a module says about the keys of its state dict, by their names in a checkpoint.

    `parameters`, `frozen`: names of parameters, and of those with `requires_grad=False`. `ties`: name -> first name of
    the same tensor. `memory`: addresses of this rank's parts of the parameters.
    """

    naming: Naming = field(default_factory=Naming)
    parameters: frozenset[str] = frozenset()
    memory: frozenset[int] = frozenset()
    frozen: frozenset[str] = frozenset()
    ties: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> ModuleNames:
        naming = naming_of(module)
        buffers = dict(module.named_buffers(remove_duplicate=False))
        parameters = dict(module.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        ties = {}
        for raw, tensor in {**parameters, **buffers}.items():
            name = naming.clean(raw)
            owner = first.setdefault(id(tensor), name)
            if owner != name:
                ties[name] = owner
        frozen = [raw for raw, p in parameters.items() if not p.requires_grad]
        return cls(
            naming,
            frozenset([*map(naming.clean, parameters), *pruned_names(module).values()]),
            frozenset(local_tensor(p).data_ptr() for p in parameters.values()),
            frozenset(naming.clean(raw) for raw in frozen),
            ties,
        )

    def is_parameter(self, key: str, value: torch.Tensor) -> bool:
        """Whether an entry is a parameter, perhaps renamed. Others (a metric's state) may differ between ranks."""
        if key in self.parameters:
            return True
        return not isinstance(value, LazyTensor) and local_tensor(value).data_ptr() in self.memory


def to_snapshot(
    checkpoint: Mapping[str, Any],
    names: ModuleNames | None,
    rank_objects: dict[str, Any],
    *,
    exclude_frozen: bool = False,
) -> Snapshot:
    """What one rank hands to a save for Lightning's dict.

    `names`: of the module; None when no module is known. `exclude_frozen`: leave out frozen weights, and record which
    they are. An entry in an unknown shape (a hook may have changed it) is stored as it is, in `client_state`.
    """
    client = dict(checkpoint)
    objects: dict[str, Any] = {"global_step": step_of(checkpoint)}
    snapshot = Snapshot(objects=objects, rank_objects=rank_objects)
    if isinstance(client.get("state_dict"), Mapping):
        _take_weights(snapshot, client.pop("state_dict"), names)
        if exclude_frozen:
            _leave_frozen(snapshot)
    if _all_known(client.get("optimizer_states")):
        states = named(client.pop("optimizer_states"), "optimizers")
        objects["optimizers"] = {n: _take_optimizer(snapshot, n, s) for n, s in states.items()}
    if isinstance(client.get("lr_schedulers"), list):
        objects["lr_schedulers"] = named(client.pop("lr_schedulers"), "schedulers")
    objects["client_state"] = tree_map_only(LazyTensor, LazyTensor.materialize, client)
    return snapshot


def step_of(checkpoint: Mapping[str, Any]) -> int:
    """The dict's `global_step`; 0 where a hook has left something else there."""
    step = checkpoint.get("global_step", 0)
    return int(step) if isinstance(step, int) and step >= 0 else 0


def _listed(by_name: Mapping[str, Any]) -> list[Any]:
    if set(by_name) == {str(i) for i in range(len(by_name))}:
        return [by_name[str(i)] for i in range(len(by_name))]
    return list(by_name.values())


def _take_weights(
    snapshot: Snapshot, state_dict: Mapping[str, Any], names: ModuleNames | None
) -> None:
    naming = names.naming if names is not None else Naming()
    extra: dict[str, Any] = {}
    weights: dict[str, torch.Tensor] = {}
    for raw, value in state_dict.items():
        key = naming.clean(raw)
        is_extra = is_extra_state(key)
        (weights if isinstance(value, torch.Tensor) and not is_extra else extra)[key] = value
    snapshot.objects["extra_state"] = extra
    aliases = _aliases(weights, names.ties if names is not None else _by_memory(weights))
    snapshot.model = {key: tensor for key, tensor in weights.items() if key not in aliases}
    snapshot.aliases = aliases
    if names is not None:
        snapshot.buffers = frozenset(
            key for key, value in snapshot.model.items() if not names.is_parameter(key, value)
        )
        snapshot.frozen = names.frozen & snapshot.model.keys()
        snapshot.experts = dict(naming.experts)


def _leave_frozen(snapshot: Snapshot) -> None:
    snapshot.excluded = snapshot.frozen
    for key in snapshot.excluded:
        del snapshot.model[key]
    kept = {k: v for k, v in snapshot.aliases.items() if v not in snapshot.excluded}
    snapshot.aliases, snapshot.frozen = kept, frozenset()


def _aliases(weights: Mapping[str, torch.Tensor], ties: Mapping[str, str]) -> dict[str, str]:
    """The ties whose two names are both there and still have the same memory."""
    return {
        name: first
        for name, first in ties.items()
        if name in weights and first in weights and _same_memory(weights[name], weights[first])
    }


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and local_tensor(a).data_ptr() == local_tensor(b).data_ptr()


def _by_memory(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    first: dict[Any, str] = {}
    ties = {}
    for name, tensor in weights.items():
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            owner = first.setdefault(place, name)
            if owner != name:
                ties[name] = owner
    return ties


def _all_known(states: Any) -> bool:
    return isinstance(states, list) and all(
        isinstance(each, dict) and (not each or each.keys() >= {"state", "param_groups"})
        for each in states
    )


def _take_optimizer(snapshot: Snapshot, name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Put the state's tensors into the snapshot; returns the optimizer's record."""
    if not state:
        return {"class": "", "groups": []}
    prefix = prefix_of(name)
    for parameter, values in state["state"].items():
        for key, value in values.items():
            add_value(snapshot.optim, f"{prefix}{parameter}/{key}", value)
    groups = [
        {
            "params": [str(parameter) for parameter in group["params"]],
            "options": {k: v for k, v in group.items() if k != "params"},
        }
        for group in state["param_groups"]
    ]
    record = {"class": state.get("class", ""), "groups": groups}
    if any(isinstance(p, int) for group in state["param_groups"] for p in group["params"]):
        record["numbered"] = True  # by place, not by name: no module was known
    rest = rest_of(state)
    return {**record, "rest": rest} if rest else record


def from_checkpoint(
    checkpoint: Checkpoint, version: str, weights_only: bool, *, with_optimizers: bool = True
) -> dict[str, Any]:
    """Lightning's dict, lazily. `version`: of Lightning, for checkpoints that it did not write.

    Raises `UnsafeObjectError` for an object that was stored as a pickle when `weights_only`.
    """
    objects = checkpoint.objects(weights_only)
    client: Any = objects.get("client_state")
    is_lightning = isinstance(client, dict) and VERSION_KEY in client
    loaded: dict[str, Any] = {**client} if is_lightning else _foreign(objects, version)
    if "state_dict" not in loaded:
        loaded["state_dict"] = lazy_state_dict(checkpoint, objects.get("extra_state", {}))
    if "optimizers" in objects and "optimizer_states" not in loaded:
        records = objects["optimizers"] if with_optimizers else {}
        loaded["optimizer_states"] = _listed(
            {name: _optimizer(checkpoint, name, record) for name, record in records.items()}
        )
    if "lr_schedulers" in objects and "lr_schedulers" not in loaded:
        loaded["lr_schedulers"] = _listed(objects["lr_schedulers"])
    return loaded


def _foreign(objects: Mapping[str, Any], version: str) -> dict[str, Any]:
    """The dict for another writer's checkpoint: weights, optimizers and schedulers are restored, loops start anew."""
    client = {"client_state": objects.get("client_state")}
    return {VERSION_KEY: version, "epoch": 0, "global_step": step_of(objects), **client}


def _optimizer(checkpoint: Checkpoint, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    groups = [{"params": list(g["params"]), **g["options"]} for g in record["groups"]]
    if not groups:
        return {}
    prefix = prefix_of(name)
    known = {parameter for group in groups for parameter in group["params"]}
    state: dict[Any, dict[str, Any]] = {}
    marked: dict[tuple[str, str], str] = {}
    for parameter, names in by_parameter(checkpoint.keys("optim"), prefix, known).items():
        for key, stored in names.items():
            kind = split_state_name(key)[1]
            if not kind:
                state.setdefault(parameter, {})[key] = checkpoint.lazy("optim", stored)
            elif kind != "entry":  # a part of another value, which asks for it
                marked[parameter, key] = stored
    for (parameter, key), value in _python_values(checkpoint, marked).items():
        state.setdefault(parameter, {})[key] = value
    if record.get("numbered"):
        state = {int(parameter): values for parameter, values in state.items()}
        for group in groups:
            group["params"] = [int(parameter) for parameter in group["params"]]
    loaded = {"class": record["class"], "state": state, "param_groups": groups}
    return {**loaded, **record.get("rest", {})}


def _python_values(
    checkpoint: Checkpoint, marked: Mapping[tuple[str, str], str]
) -> dict[tuple[str, str], Any]:
    """State that was Python values (`step#int`), read in one go. See `core.state`."""
    targets = {}
    for stored in marked.values():
        placed = checkpoint.placed("optim", stored)
        targets[stored] = torch.empty(placed.shape, dtype=TORCH_DTYPES[placed.dtype], device="cpu")
    checkpoint.read([checkpoint.request("optim", key, target) for key, target in targets.items()])
    values = {}
    for (parameter, key), stored in marked.items():
        name, kind = split_state_name(key)
        values[parameter, name] = _python_value(checkpoint, kind, targets[stored])
    return values


def _python_value(checkpoint: Checkpoint, kind: str, tensor: torch.Tensor) -> Any:
    if kind != "json":
        return python_value(kind, tensor)
    return decode_objects(
        tensor.numpy().tobytes(),
        lambda key: checkpoint.tensor("optim", key),
        dtensor=lambda key: checkpoint.lazy("optim", key),
    )
