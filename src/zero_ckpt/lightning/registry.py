"""Names under which `Trainer(strategy=...)` finds the strategy, in every installed Lightning."""

from __future__ import annotations

from typing import Any

from zero_ckpt.lightning.namespaces import installed, load
from zero_ckpt.lightning.strategy import make_strategy

__all__ = ["NAMES", "register"]

NAMES: dict[str, dict[str, Any]] = {
    "zero_ckpt": {"stage": 2},
    "zero_ckpt_stage_0": {"stage": 0},
    "zero_ckpt_stage_1": {"stage": 1},
    "zero_ckpt_stage_2": {"stage": 2},
    "zero_ckpt_stage_3": {"stage": 3},
    "zero_ckpt_stage_2_offload": {"stage": 2, "cpu_offload": True},
    "zero_ckpt_stage_3_offload": {"stage": 3, "cpu_offload": True},
    "zero_ckpt_spawn": {"stage": 2, "start_method": "spawn"},
    "zero_ckpt_fork": {"stage": 2, "start_method": "fork"},
}
"""Name -> arguments of the strategy."""


def register() -> None:
    """Enter all names into the registry of every copy. Doing it again changes nothing."""
    for namespace in installed():
        strategy = make_strategy(namespace)
        registry = load(namespace).registry
        for name, arguments in NAMES.items():
            what = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            registry.register(
                name,
                strategy,
                description=f"ZeRO with crash-safe sharded checkpoints ({what})",
                override=True,
                **arguments,
            )
