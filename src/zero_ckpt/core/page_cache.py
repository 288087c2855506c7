"""How much of a file lies in the page cache, and bringing more of it there. Answers are estimates, requests are hints.

Takes descriptors of regular files that are open for reading, and does not change the files.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from zero_ckpt.core.memory import advise

__all__ = ["cached_fraction", "read_ahead"]

_POPULATE_READ = 22  # Linux 5.14


def read_ahead(fd: int, offset: int, nbytes: int) -> None:
    """Bring these bytes into the page cache, in huge pages where the file system can. It is only a hint, and may fail.

    Through a mapping with huge pages the disk is asked to fill one piece of memory instead of hundreds.
    """
    try:
        # Copy-on-write, since ctypes takes addresses of writable memory only. Nothing is written.
        mapping = mmap.mmap(fd, nbytes, access=mmap.ACCESS_COPY, offset=offset)
        mapping.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        brought = advise(address, nbytes, _POPULATE_READ)
    except (OSError, ValueError, AttributeError):
        brought = False
    if not brought:
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)


_SAMPLES, _SAMPLE_PAGES = 64, 8


def cached_fraction(fd: int, nbytes: int) -> float:
    """How much of the file lies in the page cache, from 0.0 to 1.0, by samples (0.0 where the system cannot tell).

    Bytes that are cached are read fastest from there, all others past it.
    """
    try:
        mapping = mmap.mmap(fd, nbytes, access=mmap.ACCESS_COPY)  # ctypes wants it writable
        mincore = ctypes.CDLL(None).mincore
    except (OSError, ValueError, AttributeError):  # AttributeError: no such call on this system
        return 0.0
    pages = -(-nbytes // mmap.PAGESIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    resident = (ctypes.c_ubyte * _SAMPLE_PAGES)()
    found = asked = 0
    for first in range(0, pages, max(_SAMPLE_PAGES, pages // _SAMPLES)):
        count = min(_SAMPLE_PAGES, pages - first)
        address = ctypes.c_void_p(base + first * mmap.PAGESIZE)
        if mincore(address, ctypes.c_size_t(count * mmap.PAGESIZE), resident):
            return 0.0
        found += sum(page & 1 for page in resident[:count])
        asked += count
    return found / asked
