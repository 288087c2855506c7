"""Wrap policy: which submodules are sharded as units of their own. Pure: reads a module, changes nothing.

A unit's parameters are gathered together, just before the unit runs. So units should be the
repeated blocks of a model, must be used by calling them, and may not share a parameter with
anything outside.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from zero_ckpt.errors import ConfigurationError

__all__ = ["UNIT_NUMEL", "Root", "WrapPolicy", "check_wrap", "resolve_units"]

WrapPolicy = (
    Literal["auto"] | type[nn.Module] | Collection[type[nn.Module]] | Callable[[nn.Module], bool]
)
Root = Literal["shard", "replicate"]

# A module of this many elements (4 MB in float32) is worth a collective of its own.
UNIT_NUMEL = 1_000_000

_BLOCK_CONTAINERS = (nn.ModuleList, nn.Sequential)
_NOT_AN_INTERFACE = {"forward", "extra_repr", "reset_parameters"}


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One place of a module in the tree; a shared module occurs more than once."""

    path: str
    module: nn.Module
    chain: tuple[nn.Module, ...]  # from the root to the module itself


def resolve_units(
    module: nn.Module, wrap: WrapPolicy = "auto", *, root: Root = "shard"
) -> dict[str, nn.Module]:
    """The submodules of `module` to shard as units, by path, innermost first; `module` is never one.

    `wrap`: `"auto"`, a class or a collection of classes, or a predicate on modules. `"auto"` takes
    the classes that a Hugging Face model names in `_no_split_modules`; else the repeated blocks of
    each `ModuleList` and `Sequential`; else modules of at least `UNIT_NUMEL` elements. Where the
    root is not sharded (`root="replicate"`), `"auto"` adds the root's own children, so that they
    are sharded too.

    Left out: containers without a `forward`, modules without parameters, and units that share a
    parameter with something outside them (that parameter and the rest of such a unit belong to the
    next unit around all its owners, or to the root).

    Raises `ConfigurationError` when given classes match nothing.
    """
    check_wrap(wrap)
    tree = list(_walk(module))
    if isinstance(wrap, str):
        chosen = _automatic(module, tree, root)
    elif isinstance(wrap, type):
        chosen = _of_classes(tree, (wrap,))
    elif isinstance(wrap, Collection):
        chosen = _of_classes(tree, tuple(wrap))
    else:
        chosen = {id(o.module) for o in tree if _can_be_unit(o.module) and wrap(o.module)}
    chosen = _lift_wrappers(tree, chosen - {id(module)})
    return _in_order(tree, _without_shared_parameters(tree, chosen))


def check_wrap(wrap: object) -> None:
    """Raises `ConfigurationError` for what is no policy for any module."""
    if isinstance(wrap, str):
        if wrap == "auto":
            return
    elif isinstance(wrap, (type, Collection)):
        classes = (wrap,) if isinstance(wrap, type) else tuple(wrap)
        wrong = [c for c in classes if not (isinstance(c, type) and issubclass(c, nn.Module))]
        if not wrong:
            return
        raise ConfigurationError(f"wrap: expected subclasses of torch.nn.Module, found {wrong}.")
    elif callable(wrap):
        return
    raise ConfigurationError(f"wrap={wrap!r}: expected 'auto', module classes, or a callable.")


def _walk(root: nn.Module) -> Iterator[Occurrence]:
    """All occurrences, children before parents."""

    def visit(path: str, module: nn.Module, chain: tuple[nn.Module, ...]) -> Iterator[Occurrence]:
        chain = (*chain, module)
        for name, child in module._modules.items():
            if child is not None:
                yield from visit(f"{path}.{name}" if path else name, child, chain)
        yield Occurrence(path, module, chain)

    return visit("", root, ())


def _in_order(tree: list[Occurrence], chosen: set[int]) -> dict[str, nn.Module]:
    units: dict[int, Occurrence] = {}
    for occurrence in tree:
        if id(occurrence.module) in chosen:
            units.setdefault(id(occurrence.module), occurrence)
    return {o.path: o.module for o in units.values() if _own_parameters(o.module, chosen)}


# --- what may be a unit ---------------------------------------------------------------------------


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules


def _is_checkpoint_wrapper(module: nn.Module) -> bool:
    return "_checkpoint_wrapped_module" in module._modules


def _bare(module: nn.Module) -> nn.Module:
    """The module inside compile's and activation checkpointing's wrappers."""
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        inner = module._modules.get(name)
        if inner is not None:
            return _bare(inner)
    return module


def _can_be_unit(module: nn.Module) -> bool:
    """Whether hooks on its forward would ever run, and find parameters to gather."""
    if type(module).forward is nn.Module.forward and "forward" not in vars(module):
        return False
    # A compiled module is transparent: hooks belong to the module inside.
    return not _is_compiled(module) and next(module.parameters(), None) is not None


def _only_called(module: nn.Module) -> bool:
    """Whether calling it is the only way to use it: its classes offer no other public method.

    A module with, say, an `encode` method may be used without its forward, so its hooks may not run.
    """
    for cls in type(module).__mro__:
        if cls is nn.Module or cls.__module__.startswith("torch.nn."):
            return True
        public = {n for n, v in vars(cls).items() if callable(v) and not n.startswith("_")}
        if public - _NOT_AN_INTERFACE:
            return False
    return True


def _own_parameters(module: nn.Module, units: set[int]) -> list[nn.Parameter]:
    """Parameters of a module outside of the units within it."""
    own = [p for p in module._parameters.values() if p is not None]
    for child in module.children():
        if id(child) not in units:
            own.extend(_own_parameters(child, units))
    return own


# --- policies -------------------------------------------------------------------------------------


def _of_classes(tree: list[Occurrence], classes: tuple[type[nn.Module], ...]) -> set[int]:
    chosen = {
        id(o.module) for o in tree if isinstance(o.module, classes) and _can_be_unit(o.module)
    }
    if classes and not chosen:
        present = sorted({type(o.module).__name__ for o in tree if _can_be_unit(o.module)})
        raise ConfigurationError(
            f"wrap: no module with parameters and a forward is a "
            f"{' or '.join(c.__name__ for c in classes)}. Classes in the model that can be "
            f"wrapped: {', '.join(present) or 'none'}."
        )
    return chosen


def _automatic(module: nn.Module, tree: list[Occurrence], root: Root) -> set[int]:
    chosen = _no_split_modules(tree) or _repeated_blocks(module) or _by_size(module)
    return chosen | _children_of_root(module) if root == "replicate" else chosen


def _no_split_modules(tree: list[Occurrence]) -> set[int]:
    """Hugging Face models name the classes of their blocks."""
    names: set[str] = set()
    for occurrence in tree:
        names.update(getattr(type(occurrence.module), "_no_split_modules", None) or ())
    return {
        id(o.module) for o in tree if type(o.module).__name__ in names and _can_be_unit(o.module)
    }


def _repeated_blocks(module: nn.Module) -> set[int]:
    """Composite modules that occur at least twice by class in one list; the outermost such lists."""
    blocks: set[int] = set()
    if isinstance(module, _BLOCK_CONTAINERS):
        kinds = [type(_bare(child)) for child in module.children()]
        for child in module.children():
            inner = _bare(child)
            if kinds.count(type(inner)) > 1 and inner._modules and _can_be_unit(inner):
                blocks.add(id(inner))
    for child in module.children():
        if id(_bare(child)) not in blocks:
            blocks |= _repeated_blocks(child)
    return blocks


def _by_size(module: nn.Module) -> set[int]:
    """The innermost modules of `UNIT_NUMEL` elements, counted without the units in them."""
    chosen: set[int] = set()

    def visit(parent: nn.Module) -> None:
        for child in parent.children():
            if not isinstance(child, nn.MultiheadAttention):  # uses its children's weights directly
                visit(child)
            own = {p: p.numel() for p in _own_parameters(child, chosen)}
            # The weight of a layer that stands alone may be used directly; in a Sequential it is called.
            called = bool(child._modules) or type(parent) is nn.Sequential
            fits = called and _only_called(child) and _can_be_unit(child)
            if fits and sum(own.values()) >= UNIT_NUMEL:
                chosen.add(id(child))

    visit(module)
    return chosen


def _children_of_root(module: nn.Module) -> set[int]:
    """The composite children of a root that is not sharded, looking through lists."""
    children: set[int] = set()
    for child in module.children():
        inner = _bare(child)
        if inner._modules and _can_be_unit(inner) and _only_called(inner):
            children.add(id(inner))
        elif not _can_be_unit(inner):
            children |= _children_of_root(inner)
    return children


# --- corrections ----------------------------------------------------------------------------------


def _lift_wrappers(tree: list[Occurrence], chosen: set[int]) -> set[int]:
    """A unit inside an activation checkpointing wrapper becomes the wrapper.

    Recomputation then happens inside the unit, while its parameters are gathered.
    """
    lifted = set(chosen)
    for occurrence in tree:  # children first, so nested wrappers lift all the way
        parent = occurrence.chain[-2] if len(occurrence.chain) > 1 else None
        if (
            id(occurrence.module) in lifted
            and parent is not None
            and _is_checkpoint_wrapper(parent)
        ):
            lifted.discard(id(occurrence.module))
            lifted.add(id(parent))
    return lifted


def _without_shared_parameters(tree: list[Occurrence], chosen: set[int]) -> set[int]:
    """Drop units until all owners of each parameter have the same innermost unit around them."""
    units = set(chosen)
    shared = [places for places in _owners(tree) if len(places) > 1]
    settled = False
    while not settled:
        settled = True
        for places in shared:
            depth_of = dict(_innermost(place, units) for place in places)
            if len(depth_of) > 1:
                deepest = max(depth_of.values())
                units -= {unit for unit, depth in depth_of.items() if depth == deepest}
                settled = False
    return units


def _owners(tree: list[Occurrence]) -> list[list[Occurrence]]:
    """For every parameter, all the places that own it."""
    owners: dict[nn.Parameter, list[Occurrence]] = {}
    for occurrence in tree:
        for parameter in occurrence.module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append(occurrence)
    return list(owners.values())


def _innermost(place: Occurrence, units: set[int]) -> tuple[int, int]:
    """Identity and depth of the innermost unit around a place; depth 0 is the root."""
    for depth in range(len(place.chain) - 1, 0, -1):
        if id(place.chain[depth]) in units:
            return id(place.chain[depth]), depth
    return id(place.chain[0]), 0
