"""What decides the order of an epoch's batches, as plain values and tensors, and back.

Owns: finding a prepared loader's samplers and generators; taking and restoring their states; how
many samples one step of all ranks takes. Promises: states are tensors, numbers and strings. May not
iterate a loader, nor draw from a generator that it does not put back.

An order comes from three places: generators (of the sampler, of the loader, of a stream), numbers
(`epoch` and the seed of samplers that derive their order from them), and, for a `RandomSampler`
without a generator, one draw from torch's global generator when the epoch begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
from torch.utils.data import IterableDataset, RandomSampler

from zero_ckpt.core import rng
from zero_ckpt.core.shapes import Shape

__all__ = [
    "NOW",
    "START",
    "batches_per_step",
    "capture_now",
    "capture_start",
    "index_sampler",
    "is_stream",
    "restore_now",
    "restore_start",
    "sample_count",
    "samplers",
    "samples_per_step",
]

_NUMBERS = ("epoch", "initial_seed", "seed")

_OWN = {"generators": {str: rng.check_generator}, "numbers": {str: {str: int}}}

START: Shape = {"rng": rng.check, **_OWN}
"""What `capture_start` returns."""

NOW: Shape = {"torch": lambda state: rng.check({"torch": state}), **_OWN}
"""What `capture_now` returns."""


def index_sampler(loader: Any) -> Any:
    """What the loader takes its indices from: the batch sampler, or the sampler where there is no batching."""
    return loader.base_dataloader._index_sampler


def is_stream(loader: Any) -> bool:
    """Whether the data set has an iterator and no indices: its order is its own."""
    return isinstance(loader.dataset, IterableDataset)


def samplers(loader: Any) -> list[Any]:
    """The loader's samplers, innermost first: so a sampler has the same place on one process and on several."""
    found: list[Any] = []
    node = index_sampler(loader)
    while node is not None and all(node is not other for other in found):
        found.insert(0, node)
        inner = getattr(node, "batch_sampler", None)
        node = inner if inner is not None else getattr(node, "sampler", None)
    return found


def batches_per_step(loader: Any) -> int:
    """Batches that the loader underneath fetches for one batch of every rank."""
    dispatched = isinstance(loader, DataLoaderDispatcher) and not loader.split_batches
    return int(loader.state.num_processes) if dispatched else 1


def samples_per_step(loader: Any) -> int | None:
    """Samples that all ranks together take in one step; None where batches have no fixed size."""
    owner = index_sampler(loader)
    if not isinstance(owner, BatchSamplerShard) and isinstance(
        loader.dataset, IterableDatasetShard
    ):
        owner = loader.dataset
    size = getattr(owner, "batch_size", None)
    if not isinstance(size, int):
        return None
    if isinstance(owner, (BatchSamplerShard, IterableDatasetShard)) and not owner.split_batches:
        return size * int(owner.num_processes)
    return size * batches_per_step(loader)


def sample_count(loader: Any) -> int | None:
    """Samples in an epoch, where that is known."""
    try:
        return len(samplers(loader)[0])
    except (TypeError, NotImplementedError, AttributeError):
        return None


def capture_start(loader: Any) -> dict[str, Any]:
    """All that the order of the epoch that begins now depends on."""
    return {"rng": rng.capture(), **_own(loader)}


def restore_start(loader: Any, state: Mapping[str, Any]) -> None:
    """Put all back to how it was at `capture_start`, torch's, Python's and NumPy's global generators included."""
    rng.restore(state["rng"])
    live = _generators(loader)
    _set_own(loader, state)
    if "sampler 0" in live and "sampler 0" not in state["generators"]:
        # The order then came from one draw of the global generator, at this moment.
        live["sampler 0"].manual_seed(_draw_seed(None))


def capture_now(loader: Any) -> dict[str, Any]:
    """What the order of the next epoch depends on, as far as the loader itself holds it, and torch's generator."""
    return {"torch": torch.get_rng_state(), **_own(loader)}


def restore_now(loader: Any, state: Mapping[str, Any]) -> None:
    """Put the loader back to how it was at `capture_now`. Global generators stay as they are."""
    live = _generators(loader)
    _set_own(loader, state)
    if "sampler 0" in live and "sampler 0" not in state["generators"]:
        generator = torch.Generator()
        generator.set_state(state["torch"].cpu())
        _draw_seed(generator)  # every epoch draws one for the workers first
        live["sampler 0"].manual_seed(_draw_seed(generator))


def _own(loader: Any) -> dict[str, Any]:
    numbers = {
        str(place): {
            name: value
            for name in _NUMBERS
            if type(value := getattr(sampler, name, None)) is int  # not of a bool
        }
        for place, sampler in enumerate(samplers(loader))
    }
    states = {name: each.get_state() for name, each in _generators(loader).items()}
    return {"generators": states, "numbers": {k: v for k, v in numbers.items() if v}}


def _set_own(loader: Any, state: Mapping[str, Any]) -> None:
    chain = samplers(loader)
    shuffler = chain[0] if isinstance(chain[0], RandomSampler) else None
    if shuffler and shuffler.generator is None and "sampler 0" in state["generators"]:
        # Accelerate gives it one on several processes, and none on one.
        shuffler.generator = torch.Generator()
    for name, generator in _generators(loader).items():
        if name in state["generators"]:
            generator.set_state(state["generators"][name].cpu())
    for place, sampler in enumerate(chain):
        for name, value in state["numbers"].get(str(place), {}).items():
            if type(getattr(sampler, name, None)) is int:
                setattr(sampler, name, value)


def _generators(loader: Any) -> dict[str, torch.Generator]:
    stream = loader.dataset
    if isinstance(stream, IterableDatasetShard):
        stream = stream.dataset
    owners = {f"sampler {place}": sampler for place, sampler in enumerate(samplers(loader))}
    owners |= {"loader": loader.base_dataloader, "data set": stream}
    found = {name: getattr(owner, "generator", None) for name, owner in owners.items()}
    return {name: each for name, each in found.items() if isinstance(each, torch.Generator)}


def _draw_seed(generator: torch.Generator | None) -> int:
    """A seed as torch's `RandomSampler` and loaders draw theirs."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())
