"""A user's program whose ranks Accelerate forks: `python -m tests.accelerate.launched debug_launcher folder`.

In a process of its own, since a fork copies what all other tests have left in theirs, and since ranks that hang are
ended with it.
"""

from __future__ import annotations

import sys

import accelerate
import pytest
import torch
from accelerate import Accelerator

from tests.accelerate.harness import assert_same, batches, make, state_of, train
from zero_ckpt.errors import ConfigurationError


def loop(folder: str) -> None:
    """Train at each stage, save, train on, load what was saved, and train on the same."""
    for stage in (None, 1, 3):
        made = make(stage, async_save=stage == 3)
        accelerator = made[0]
        assert accelerator.num_processes == 2
        train(made, batches(3))
        accelerator.save_state(f"{folder}/{stage}", client_state={"epoch": 3})
        losses, seen = train(made, batches(2, 3)), state_of(made)
        assert accelerator.load_state(f"{folder}/{stage}") == {"epoch": 3}
        assert train(made, batches(2, 3)) == losses
        assert_same(state_of(made), seen)
        accelerator.wait_for_saves()
        accelerator.free_memory()
    accelerator.end_training()


def attached_after_a_copy() -> None:
    """Told what is wrong, where an accelerator of the program itself has been copied into its ranks."""
    with pytest.raises(ConfigurationError, match="before the processes were started"):
        make(2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "debug_launcher":
        accelerate.debug_launcher(loop, (sys.argv[2],), num_processes=2)
        Accelerator(cpu=True)
        accelerate.debug_launcher(attached_after_a_copy, num_processes=2)
    else:
        free_port = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0"}
        accelerate.notebook_launcher(loop, (sys.argv[2],), num_processes=2, **free_port)
    print("all is well")
