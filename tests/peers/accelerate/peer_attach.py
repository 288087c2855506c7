"""Every `Accelerator` that is made is attached, with its arguments and those in `PEER_STAGE`."""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator

__all__ = ["attach_all"]


def attach_all() -> None:
    """From now on, in this process. `PEER_STAGE`: the ZeRO stage; empty: what Accelerate does."""
    from zero_ckpt.accelerate import attach

    stage = int(os.environ["PEER_STAGE"]) if os.environ.get("PEER_STAGE") else None
    make = Accelerator.__init__

    def make_and_attach(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        attach(self, stage)

    Accelerator.__init__ = make_and_attach
