"""Several ranks as threads of one process: a save takes milliseconds, so that it can be made to fail at every step.

State is a pure function of the step: a tensor that all ranks hold, one for each rank, and objects.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import HashStore

from zero_ckpt.core.decoupled import AsyncEngine
from zero_ckpt.core.engine import SyncEngine
from zero_ckpt.core.state import Snapshot
from zero_ckpt.core.storage import Storage
from zero_ckpt.core.store_control import StoreControl

ENGINES: dict[str, Callable[..., Any]] = {"async": AsyncEngine, "sync": SyncEngine}
"""Every engine that saves: the sweeps go over all of them."""

TIMEOUT = 20.0


def snapshot(step: int, rank: int) -> Snapshot:
    tensor = torch.full((5, 3), float(step))
    return Snapshot(
        model={"shared": tensor, f"own{rank}": tensor + rank},
        objects={"step": step},
        rank_objects={"rank": rank, "tensor": tensor},
    )


class Team:
    """`world_size` engines that keep their buffers from save to save."""

    def __init__(self, world_size: int, storage: Storage, engine: str = "sync") -> None:
        store = HashStore()
        self.engines = [
            ENGINES[engine](storage=storage, control=StoreControl(store, rank, world_size))
            for rank in range(world_size)
        ]

    def save(
        self, directory: str | Path, tag: str, step: int, **options: Any
    ) -> list[BaseException | None]:
        """What each rank raised. Warnings after a commit are none."""
        outcomes: list[BaseException | None] = [None] * len(self.engines)

        def rank_main(rank: int) -> None:
            given = {"step": step, "zero_stage": 0, "timeout": TIMEOUT, **options}
            try:
                saving = self.engines[rank].save(directory, tag, snapshot(step, rank), **given)
                saving.wait()
            except BaseException as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=rank_main, args=(r,)) for r in range(len(outcomes))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return outcomes
