"""The local disk, and whatever else is mounted: every system call on a checkpoint's files. A `Storage`.

Files are written and read with direct I/O (`O_DIRECT`), past the page cache, from aligned buffers: on the disks that
checkpoints go to, buffered write-back is the bottleneck. A file system that refuses it is used through the cache. An
fsync is never retried: after a failed one the kernel may have dropped the data.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from zero_ckpt.core.memory import WINDOW, round_up
from zero_ckpt.core.page_cache import cached_fraction, read_ahead
from zero_ckpt.core.storage import Entry, FileReader, FileWriter

__all__ = ["LocalStorage"]


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
        fd = _open_to_write(temporary, os.O_CREAT | os.O_TRUNC)
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
        room = os.statvfs(next(each for each in (Path(path), *Path(path).parents) if each.exists()))
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
    """Open a regular file for reading; refuse anything else at once, since opening a pipe could wait for ever."""
    return _only_regular(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), path)


def _open_to_write(path: str, flags: int) -> int:
    """Open a regular file for writing, or make one; refuse anything else at once.

    A symbolic link is refused too: what it names is not ours to overwrite.
    """
    flags |= os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a pipe that nobody reads, or a socket
            raise _no_file(path) from error
        if error.errno == errno.ELOOP and os.path.islink(path):
            raise OSError(errno.ELOOP, "a symbolic link, and no file", path) from error
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
        self._path, self._shared = path, shared
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
            # Several threads may find out at once that the file system refuses it.
            was_direct = self._direct
            try:
                _write_all(self._fd, data, offset)
            except OSError as error:
                if not was_direct or error.errno != errno.EINVAL:
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
        if not self._shared:
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
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


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
            if direct and cached_fraction(self._cached_fd, self.nbytes) < 0.5:
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
        read_ahead(self._cached_fd, offset, nbytes)
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
        """Once, whatever the system says of it: a number that was given back may be another file's by now."""
        opened = self._cached_fd, self._direct_fd
        self._cached_fd = self._direct_fd = -1
        for fd in opened:
            with contextlib.suppress(OSError):  # of what was read nothing is lost
                if fd >= 0:
                    os.close(fd)

    def __del__(self) -> None:
        """A lazy tensor may have opened the file again after its checkpoint was closed."""
        self.close()
