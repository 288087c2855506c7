"""One rank's random number generators as plain tensors and numbers, and back.

Owns torch's CPU generator, the rank's CUDA generator, NumPy's legacy global generator and Python's `random`. Promises:
`restore(capture())` continues the four streams bitwise. May not touch a generator that a user created.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zero_ckpt.core.foreign import ForeignManifest

if TYPE_CHECKING:
    from zero_ckpt.core.checkpoint import Checkpoint

__all__ = [
    "Streams",
    "capture",
    "check",
    "check_generator",
    "count_ranks",
    "derive",
    "plan_restore",
    "restore",
    "streams",
    "world_size_notice",
]


@dataclass(frozen=True, slots=True)
class Streams:
    """The states of this process's generators as these give them; None for one that was not asked.

    Not converted to what is stored, for places that are passed often: asking torch takes 2 microseconds, Python 20 and
    NumPy 100.
    """

    torch: torch.Tensor
    python: tuple[Any, ...] | None
    numpy: tuple[Any, ...] | None

    def packed(self) -> dict[str, Any]:
        """In the form that is stored and that `restore` takes: tensors, numbers and strings."""
        state: dict[str, Any] = {"torch": self.torch}
        if self.python is not None:
            version, words, gauss = self.python
            state["python"] = {
                "version": version,
                "words": torch.tensor(words, dtype=torch.int64, device="cpu"),
                "gauss": gauss,
            }
        if self.numpy is not None:
            state["numpy"] = _packed_numpy(self.numpy)
        return state


def streams(*, python: bool = True, numpy: bool = True) -> Streams:
    """The states of torch's CPU generator and, where asked for, of Python's and NumPy's."""
    legacy = sys.modules["numpy"].random if numpy and "numpy" in sys.modules else None
    return Streams(
        torch.get_rng_state(),
        random.getstate() if python else None,
        None if legacy is None else legacy.get_state(),
    )


def capture(device: torch.device | None = None) -> dict[str, Any]:
    """The state of this process's generators; with a CUDA `device`, that device's too.

    Values are uint8 and int64 tensors, numbers and strings, so that they are stored without a pickle.
    """
    state = streams().packed()
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Put the generators back to what `capture` saw. A stream that was not captured is left alone."""
    torch.set_rng_state(state["torch"].cpu())
    if "python" in state:
        random.setstate(_unpacked_python(state["python"]))
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(_unpacked_numpy(state["numpy"]))
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def check(state: Mapping[str, Any]) -> None:
    """Raises whatever `restore` would, and touches no stream of the process."""
    torch.Generator().set_state(state["torch"].cpu())
    if "python" in state:
        random.Random().setstate(_unpacked_python(state["python"]))
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.RandomState().set_state(_unpacked_numpy(state["numpy"]))
    if "cuda" in state:
        check_generator(state["cuda"])


def check_generator(state: Any) -> None:
    """Raises when it is no state of a `torch.Generator`, whose length only its device knows."""
    if not isinstance(state, torch.Tensor) or state.dtype is not torch.uint8 or state.ndim != 1:
        raise TypeError("no state of a torch.Generator")


def derive(state: Mapping[str, Any], rank: int, device: torch.device | None = None) -> None:
    """Seed this rank's generators from another rank's `state`: for a world size that the checkpoint has not.

    Ranks that derive from the same state get different streams, and the same ones on every resume.
    """
    generator = torch.Generator()
    generator.set_state(state["torch"].cpu())
    seeds = torch.randint(2**32, (rank + 1,), generator=generator, dtype=torch.int64)
    seed = int(seeds[rank])
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _packed_numpy(state: tuple[Any, ...]) -> dict[str, Any]:
    name, keys, position, has_gauss, cached = state
    return {
        "name": name,
        "keys": torch.from_numpy(keys.astype("int64")),
        "position": int(position),
        "has_gauss": int(has_gauss),
        "cached_gaussian": float(cached),
    }


def _unpacked_python(state: Mapping[str, Any]) -> tuple[Any, ...]:
    words = tuple(int(word) for word in state["words"].tolist())
    return int(state["version"]), words, state["gauss"]


def _unpacked_numpy(state: Mapping[str, Any]) -> tuple[Any, ...]:
    keys = state["keys"].numpy().astype("uint32")
    return state["name"], keys, state["position"], state["has_gauss"], state["cached_gaussian"]


def plan_restore(
    state: Mapping[str, Any] | None, same: bool, rank: int, device: torch.device | None = None
) -> Callable[[], None]:
    """A function that sets this rank's generators: to `state` at the `same` world size, else derived from it.

    `state`: this rank's own, or rank 0's at another world size; None when nothing was saved.
    """
    if state is None:
        return lambda: None
    if same:
        return lambda: restore(state, device)
    return lambda: derive(state, rank, device)


def count_ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def world_size_notice(checkpoint: Checkpoint, world_size: int) -> str:
    """What the user should know of generators that are derived; "" at the same world size, or without any."""
    saved = checkpoint.manifest.world_size
    if saved == world_size or isinstance(checkpoint.manifest, ForeignManifest):
        return ""
    return (
        f"{checkpoint.path} was saved by {count_ranks(saved)} and is loaded by {world_size}: random number generators "
        "are derived from rank 0's, so random draws differ from an uninterrupted run's."
    )
