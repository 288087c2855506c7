"""Writes a range of an output file: the next window is assembled while the last is written, past the page cache.

Extra memory is that of a few windows, used again and again, and of the block cache, whatever the file's size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from zero_ckpt.core.buffers import StagingPool, WriteThreads
from zero_ckpt.core.storage import FileWriter
from zero_ckpt.fp32.assembly import Assembler
from zero_ckpt.fp32.checksums import Checksums

__all__ = ["WINDOW", "write_range"]

WINDOW = 4 << 20
"""Bytes that are assembled and written at once; as long as a buffer of the `StagingPool`."""


def write_range(
    writer: FileWriter,
    assembler: Assembler,
    checksums: Checksums,
    begin: int,
    end: int,
    pool: StagingPool,
    written: Callable[[int], bool],
) -> list[int]:
    """Write bytes `begin .. end`; `begin` is a multiple of `WINDOW`.

    Returns the beginnings of windows that are not written yet, since they hold a checksum that is known only when the
    range before this one is written. `written(nbytes)` is called after each window and says whether to go on. Raises
    what reading or writing raised, whatever stopped it first; the writer stays open.
    """
    threads = WriteThreads(writer, pool, lambda: None)
    waiting: list[int] = []
    try:
        for start in range(begin, end, WINDOW):
            if threads.error is not None:
                break
            stop = min(start + WINDOW, end)
            buffer = pool.take()
            try:
                assembler.fill(buffer, start, stop)
                checksums.update(buffer, start, stop)
                complete = checksums.put(buffer, start, stop)
            except BaseException:
                pool.give(buffer)
                raise
            if not complete:
                pool.give(buffer)
                waiting.append(start)
                continue
            threads.put(start, buffer, stop - start)
            if not written(stop - start):
                break
    except BaseException:
        with suppress(
            Exception
        ):  # what the writing of earlier windows says then is not why it stopped
            threads.join()
        raise
    threads.join()
    return waiting
