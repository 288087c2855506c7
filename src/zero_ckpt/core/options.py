"""Whether the optimizers of all ranks have the same options. Those of rank 0 are what is stored.

They differ when an optimizer's step writes into them what it has measured on its own part of the parameters only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

__all__ = ["digests_of_options", "options_notice"]

_COMPARED = (bool, int, float, str, type(None))


def digests_of_options(records: Mapping[str, Any]) -> dict[str, str]:
    """Name of an option -> digest of its values in all groups of all optimizers. `records`: of `capture_optimizer`."""
    values: dict[str, list[Any]] = {}
    for record in records.values():
        for group in record["groups"]:
            for name, value in group["options"].items():
                if type(value) in _COMPARED:
                    values.setdefault(str(name), []).append(value)
    return {name: xxhash.xxh3_64_hexdigest(repr(found).encode()) for name, found in values.items()}


def options_notice(ranks: Sequence[Mapping[str, str]]) -> str:
    """A warning of options in which ranks differ; "" when there are none."""
    odd = {
        n
        for found in ranks
        for n in found.keys() | ranks[0].keys()
        if found.get(n) != ranks[0].get(n)
    }
    if not odd:
        return ""
    shown = ", ".join(f"'{name}'" for name in sorted(odd)[:6])
    return (
        f"options of the optimizers differ between ranks ({shown}); rank 0's are saved, and a resumed run goes on with "
        "those. An optimizer whose step measures all parameters together (Prodigy, D-Adaptation) sees only a rank's "
        "own part of what is sharded: use stage 0, or its own option for sharded training."
    )
