"""The one seam between checkpoints and bytes: the `Storage` protocol, and the local disk.

Owns every system call that touches a checkpoint. Promises: a file that `FileWriter.finish` returned for is durable; a
name that `put` returned for holds all of the new bytes or, after a crash, all of the old. It knows nothing of what the
bytes mean, and never retries an fsync: after a failed one the kernel may have dropped the data.

The local disk is written and read with direct I/O (`O_DIRECT`), past the page cache, from aligned buffers: on the disks
that checkpoints go to, buffered write-back is the bottleneck. A file system that refuses it is used through the cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from zero_ckpt.core.memory import WINDOW, round_up

__all__ = ["Entry", "FileReader", "FileWriter", "LocalStorage", "Storage"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a folder. A symbolic link is no folder, whatever it names."""

    name: str
    is_dir: bool
    nbytes: int


class FileWriter(Protocol):
    """A new file. Parts are aligned, multiples of `ALIGNMENT` long, and may come from several threads in any order."""

    def write(self, offset: int, data: memoryview) -> None: ...

    def finish(self, nbytes: int) -> None:
        """Cut to `nbytes` (padding of the last part goes away), make durable, close."""

    def abort(self) -> None:
        """Close and remove what was written. Never raises."""


class FileReader(Protocol):
    """An existing file, opened once. Reads may come from several threads."""

    nbytes: int

    def expect(self, offset: int, nbytes: int, keep: bool = False) -> int:
        """Told before these bytes are read: returns how many of them to ask for at once, a multiple of `ALIGNMENT`.

        Few where they come through this machine's memory, so that they can be worked on while a core's cache holds
        them, and then they may be read into any memory. All where every read is a journey.
        """

    def read_into(self, offset: int, nbytes: int, buffer: memoryview, keep: bool = False) -> None:
        """Read exactly `nbytes` into the start of the aligned `buffer`, which has room for `round_up(nbytes)`.

        `offset` is aligned. `keep`: the same bytes will be read again soon. Raises EOFError when the file is shorter.
        """

    def close(self) -> None: ...


class Storage(Protocol):
    """What a place for checkpoints must do. Paths are absolute and `/`-separated. Errors are OSErrors."""

    def create(self, path: str, nbytes: int, *, shared: bool = False) -> FileWriter:
        """A new or emptied file with room for `nbytes` reserved where the file system can; parents are made.

        `shared`: the file is there already; this writer and those of other ranks each write their own parts of it.
        """

    def open(self, path: str) -> FileReader: ...

    def put(self, path: str, data: bytes) -> None:
        """Replace the file at `path` atomically and durably; parents are made."""

    def get(self, path: str, limit: int) -> bytes:
        """The whole file. Raises ValueError when it is longer than `limit` bytes."""

    def list(self, path: str) -> list[Entry]:
        """The folder's entries by name. Raises FileNotFoundError or NotADirectoryError."""

    def remove(self, path: str) -> None:
        """Remove a file, a link (not what it names) or a folder with all in it. Missing is fine."""

    def sync(self, path: str) -> None:
        """Make the folder's entries, made or removed before, durable."""

    def free_bytes(self, path: str) -> int | None:
        """Bytes that may still be written below `path`, or None when unknown."""


class LocalStorage:
    """A mounted file system: ext4, xfs, NFS, Lustre, tmpfs and the like."""

    def __init__(self, *, direct: bool = True) -> None:
        self._direct = direct and hasattr(os, "O_DIRECT")

    def create(self, path: str, nbytes: int, *, shared: bool = False) -> FileWriter:
        if not shared:
            self._make_parents(path)
        return _LocalWriter(path, nbytes, self._direct, shared)

    def open(self, path: str) -> FileReader:
        return _LocalReader(path, self._direct)

    def put(self, path: str, data: bytes) -> None:
        self._make_parents(path)
        temporary = f"{path}.tmp"
        # A link is not followed: what it names is not ours to empty.
        fd = _open_to_write(temporary, os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
        try:
            try:
                with _naming(path):
                    _write_all(fd, memoryview(data), 0)
                    os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        self.sync(os.path.dirname(path))

    def get(self, path: str, limit: int) -> bytes:
        with os.fdopen(_open_regular(path), "rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            if nbytes > limit:
                raise ValueError(
                    f"it is {nbytes} bytes long, longer than the {limit} bytes that such a file may have"
                )
            # Never read(limit): Python makes room for as much as it is asked for.
            return file.read(nbytes)

    def list(self, path: str) -> list[Entry]:
        return sorted(_entries(path), key=lambda entry: entry.name)

    def remove(self, path: str) -> None:
        try:
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        except FileNotFoundError:
            pass

    def sync(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with _naming(path):
                os.fsync(fd)
        except OSError as error:
            # Some network file systems cannot sync a folder; they order metadata on the server.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(fd)

    def free_bytes(self, path: str) -> int | None:
        existing = Path(path)
        while not existing.exists():
            existing = existing.parent
        room = os.statvfs(existing)
        return room.f_bavail * room.f_frsize

    def _make_parents(self, path: str) -> None:
        """Make the missing parents of `path`, each entry durable before anything is put below it."""
        parent = os.path.dirname(path)
        if os.path.isdir(parent):
            return
        self._make_parents(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(parent)
        self.sync(os.path.dirname(parent))


def _entries(path: str) -> Iterator[Entry]:
    with os.scandir(path) as found:
        for item in found:
            try:
                nbytes = item.stat(follow_symlinks=True).st_size
            except OSError:
                continue  # removed since it was listed, or a link that leads nowhere
            yield Entry(item.name, item.is_dir(follow_symlinks=False), nbytes)


def _open_regular(path: str) -> int:
    """Open for reading what is a file, at once: opening a pipe, or reading a terminal, could wait for ever."""
    return _only_regular(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), path)


def _open_to_write(path: str, flags: int) -> int:
    """Open for writing what is a file, or is to be one, at once."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a pipe that nobody reads, or a socket
            raise _no_file(path) from error
        raise
    return _only_regular(fd, path)


def _only_regular(fd: int, path: str) -> int:
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise _no_file(path)


def _no_file(path: str) -> OSError:
    return OSError(errno.ENOTSUP, "a pipe, a socket or a device, and no file", path)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Around calls on a descriptor, whose errors do not say which file it is."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        if written == 0:
            raise OSError(errno.EIO, "the disk took no bytes")
        data, offset = data[written:], offset + written


class _LocalWriter:
    def __init__(self, path: str, nbytes: int, direct: bool, shared: bool) -> None:
        self._path = path
        new = 0 if shared else os.O_CREAT | os.O_TRUNC
        self._fd, self._direct = _open_direct(_open_to_write, path, new, direct)
        try:
            if not shared:
                with _naming(path):
                    _reserve(self._fd, nbytes)
        except BaseException:
            self.abort()
            raise

    def write(self, offset: int, data: memoryview) -> None:
        with _naming(self._path):
            try:
                _write_all(self._fd, data, offset)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                _clear_direct(self._fd)
                self._direct = False
                _write_all(self._fd, data, offset)

    def finish(self, nbytes: int) -> None:
        try:
            with _naming(self._path):
                os.ftruncate(self._fd, nbytes)
                os.fsync(self._fd)
        finally:
            self._close()

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _open_direct(
    opened: Callable[[str, int], int], path: str, flags: int, direct: bool
) -> tuple[int, bool]:
    """(descriptor, whether it is direct): file systems without `O_DIRECT` refuse it here with EINVAL."""
    if direct:
        try:
            return opened(path, flags | os.O_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return opened(path, flags), False


def _clear_direct(fd: int) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def _reserve(fd: int, nbytes: int) -> None:
    """Take the space now, so that a full disk is known before anything is staged."""
    if not nbytes or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, round_up(nbytes))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


class _LocalReader:
    def __init__(self, path: str, direct: bool) -> None:
        self._cached_fd = self._direct_fd = -1
        self._cached_fd = _open_regular(path)
        try:
            self.nbytes = os.fstat(self._cached_fd).st_size
            if direct and _cached_fraction(self._cached_fd, self.nbytes) < 0.5:
                fd, is_direct = _open_direct(os.open, path, os.O_RDONLY | os.O_CLOEXEC, True)
                if is_direct:
                    self._direct_fd = fd
                else:
                    os.close(fd)
        except BaseException:
            self.close()
            raise

    def expect(self, offset: int, nbytes: int, keep: bool = False) -> int:
        if self._direct_fd < 0:
            return WINDOW
        if not keep:
            return round_up(nbytes)
        _read_ahead(self._cached_fd, offset, nbytes)
        return WINDOW

    def read_into(self, offset: int, nbytes: int, buffer: memoryview, keep: bool = False) -> None:
        fd = self._cached_fd if keep or self._direct_fd < 0 else self._direct_fd
        done = 0
        while done < nbytes:
            stop = round_up(nbytes) if fd == self._direct_fd else nbytes
            try:
                count = os.preadv(fd, [buffer[done:stop]], offset + done)
            except OSError as error:
                if fd != self._direct_fd or error.errno != errno.EINVAL:
                    raise
                fd = self._cached_fd  # refused here, or an odd remainder at the end of the file
                continue
            if count == 0:
                raise EOFError(f"the file ends at byte {offset + done}")
            done += count

    def close(self) -> None:
        for fd in (self._cached_fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._cached_fd = self._direct_fd = -1

    def __del__(self) -> None:
        """A lazy tensor may have opened the file again after its checkpoint was closed."""
        self.close()


_POPULATE_READ = 22  # Linux 5.14


def _read_ahead(fd: int, offset: int, nbytes: int) -> None:
    """Bring these bytes into the page cache, in huge pages where the file system can. It is only a hint, and may fail.

    Read through a mapping that may have huge pages, the disk is asked for one piece of memory instead of hundreds.
    """
    try:
        mapping = mmap.mmap(
            fd, nbytes, access=mmap.ACCESS_COPY, offset=offset
        )  # ctypes wants it writable
        mapping.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _POPULATE_READ)
    except (OSError, ValueError, AttributeError):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)


_SAMPLES, _SAMPLE_PAGES = 64, 8


def _cached_fraction(fd: int, nbytes: int) -> float:
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
