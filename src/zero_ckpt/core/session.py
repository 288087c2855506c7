"""Which launch of the ranks the entries of a rendezvous store belong to.

An elastic agent holds the store itself, and gives it to the ranks that it starts after others have died: what those
left there, requests as well as who they were, must be nobody's now. So rank 0 opens a session, and all keys lie within
it. The others find its name in the store. It may still be that of a rank 0 which is gone: then they look again while
they wait, and move over. Until then nobody would learn that such a rank has died, but from the agent, which ends all.

Any other store ends with its ranks, and has one session.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from functools import cache
from typing import Any

from zero_ckpt.core.watch import has_died, identity

__all__ = ["SESSION_KEY", "opened_session", "session_to_join"]

SESSION_KEY = "zero_ckpt/session"

_ONLY = "0"


def opened_session(store: Any) -> str:
    """The name of the session of this process, a rank 0, which `store` tells the others from now on."""
    if not _outlives_ranks():
        return _ONLY
    name = _own_name(os.getpid())
    store.set(SESSION_KEY, json.dumps([name, identity()]).encode())
    return name


def session_to_join(look_up: Callable[[str], bytes | None]) -> str:
    """The session that rank 0 has opened; "" when there is none yet. `look_up(key)`: what the store has there.

    Of a rank 0 that is gone from this host neither: the agent ends all ranks before it starts new ones, so this is what
    earlier ones left.
    """
    if not _outlives_ranks():
        return _ONLY
    value = look_up(SESSION_KEY)
    if value is None:
        return ""
    name, rank_0 = json.loads(value)
    return "" if has_died(rank_0) else str(name)


@cache
def _own_name(pid: int) -> str:
    """The process is its argument: a forked one is another rank."""
    return uuid.uuid4().hex[:12]


def _outlives_ranks() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
