"""Which launch of the ranks the entries of a rendezvous store belong to.

An elastic agent holds the store itself, and gives it to the ranks that it starts after others have died: what those
left there, requests as well as who they were, must be nobody's now. So rank 0 opens a session, and all keys lie within
it. The others find its name in the store. It may still be that of a rank 0 which is gone: then they look again while
they wait, and move over.
"""

from __future__ import annotations

import json
import os
import uuid
from functools import cache

from zero_ckpt.core.watch import has_died, identity

__all__ = ["SESSION_KEY", "opened_session", "session_to_join"]

SESSION_KEY = "zero_ckpt/session"


def opened_session() -> tuple[str, bytes]:
    """The name of the session of this process, a rank 0, and what it puts under `SESSION_KEY`."""
    name = _own_name(os.getpid())
    return name, json.dumps([name, identity()]).encode()


def session_to_join(value: bytes | None) -> str:
    """The session that `SESSION_KEY` names; "" when there is none yet.

    In an agent's store neither the session of a rank 0 that is gone from this host: the agent ends all ranks before it
    starts new ones, so this is what earlier ones left.
    """
    if value is None:
        return ""
    name, rank_0 = json.loads(value)
    return "" if _outlives_ranks() and has_died(rank_0) else str(name)


@cache
def _own_name(pid: int) -> str:
    """The process is its argument: a forked one is another rank."""
    return uuid.uuid4().hex[:12]


def _outlives_ranks() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
