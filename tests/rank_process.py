"""One rank's process, from its start to its exit; the other end of ``tests/workers.py``.

It may not outlive the test process, and reports over its link: ``joined`` once it is in the group,
then a pickled report of how the function ended.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True, slots=True)
class Job:
    """What a rank is told: who it is, where the store is, what to run."""

    rank: int
    world_size: int
    port: int
    backend: str
    log: str
    payload: bytes  # pickled (function, arguments)


def rank_main(job: Job, link: Connection, environ: dict[str, str]) -> None:
    """A rank's life: join the group, run, report, stay until all are done, leave."""
    _isolate(job.log)
    _set_environment(job, environ)
    report = _run(job, link)
    link.send_bytes(report)
    if pickle.loads(report)["status"] == "returned":
        # Leaving at once would close connections on which peers still receive.
        link.recv_bytes()
    _leave_group()


def _isolate(log: str) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - lives as long as the rank
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # What our own code causes is an error, as in the test process; what torch does inside is not.
    warnings.resetwarnings()
    warnings.filterwarnings("error", module=r"(zero_ckpt|tests)(\.|$)")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _set_environment(job: Job, environ: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environ, **ONE_THREAD)
    os.environ.update(
        RANK=str(job.rank),
        LOCAL_RANK=str(job.rank),
        WORLD_SIZE=str(job.world_size),
        LOCAL_WORLD_SIZE=str(job.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
        GLOO_SOCKET_IFNAME=_LOOPBACK,
    )
    # Lightning reads its rank when it is imported, which the server did before there was one.
    rank_zero = sys.modules.get("lightning_utilities.core.rank_zero")
    if rank_zero is not None:
        rank_zero.rank_zero_only.rank = job.rank


def _run(job: Job, link: Connection) -> bytes:
    try:
        try:
            _join_group(job)
        finally:
            link.send_bytes(b"joined")
        fn, args = pickle.loads(job.payload)
        return pickle.dumps({"status": "returned", "value": fn(*args)})
    except BaseException as error:
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        text = "".join(traceback.format_exception(error))
        return pickle.dumps({"status": "raised", "error_type": kind, "error": text})


def _join_group(job: Job) -> None:
    import numpy as np
    import torch
    import torch.distributed as dist

    np.random.seed()  # forked ranks would otherwise share the server's state
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", job.port, is_master=False)
    dist.init_process_group(job.backend, store=store, rank=job.rank, world_size=job.world_size)
    # A rank that dies at once would break off the others' connecting, not what they run.
    store.set(f"joined/{job.rank}", "")
    store.wait([f"joined/{rank}" for rank in range(job.world_size)])
    os.register_at_fork(before=_let_threads_rest)


def _let_threads_rest() -> None:
    """Before a data loader forks its workers, as Accelerate's does right after a broadcast.

    A thread of gloo that lets go of a tensor makes itself a Python thread state, under a lock that it does not need the
    GIL for. A fork at that moment leaves the lock taken in the child, which Python 3.11 then waits for, forever.
    """
    time.sleep(0.01)


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
