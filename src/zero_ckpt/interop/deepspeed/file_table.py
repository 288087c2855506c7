"""The sources of one tag's folder: its files, each opened once, and what stands for parts of them.

The core expects a tensor at a multiple of its elements' size and in row-major order, which these files do not promise.
Owns what is put in between where they do not: storages at odd addresses are gathered, strided tensors made contiguous,
each in a source of its own, at which the file's tensors are pointed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

from zero_ckpt.core.storage import Storage as Files
from zero_ckpt.interop.deepspeed.sources import Bytes, FileSource, Gathered, Source, Strided
from zero_ckpt.interop.deepspeed.tensors import Storage, StoredTensor
from zero_ckpt.interop.deepspeed.torch_files import TorchFile, open_torch_file

__all__ = ["FileTable"]


class FileTable:
    """The sources of one tag's folder, by number. Files are opened once; numbers are given in the order of opening."""

    def __init__(self, files: Files, folder: str) -> None:
        self.files, self.folder = files, folder
        self.sources: list[Source] = []
        self._opened: dict[str, TorchFile] = {}
        self._files: list[TorchFile] = []
        self._numbers = Bytes(f"{folder} (numbers)")
        self._numbers_at: int | None = None

    def open(self, name: str) -> TorchFile:
        """A file of the folder, by its name there. Raises `CorruptShardError` or `UnsafeObjectError`."""
        if name not in self._opened:
            path = f"{self.folder}/{name}"
            number = len(self.sources)
            found = open_torch_file(self.files, path, number)
            source = FileSource(self.files, path, found.nbytes)
            self.sources.append(source)
            self._align(source, found)
            for storage in found.storages:
                for tensor in storage.views:
                    if not tensor.is_contiguous:
                        self._straighten(tensor)
            self._opened[name] = found
            self._files.append(replace(found, tree=None, storages=[]))
        return self._opened[name]

    def forget(self, name: str) -> None:
        """Let go of a file's tree, which is not needed any more. Its bytes stay readable."""
        self._opened.pop(name, None)

    def forget_all(self) -> None:
        """Let go of the trees of all files."""
        self._opened.clear()

    @property
    def paths(self) -> set[str]:
        """The paths of the files themselves."""
        return {file.path for file in self._files}

    def opened(self) -> list[TorchFile]:
        """Every file that was opened, without its tree when that was forgotten."""
        return self._files

    def source_of(self, path: str) -> Source:
        return next(source for source in self.sources if source.name == path)

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    def number(self, data: bytes) -> tuple[int, int]:
        """(source, address) of a number's bytes, which no file holds as a tensor."""
        if self._numbers_at is None:
            self._numbers_at = self.add(self._numbers)
        return self._numbers_at, self._numbers.add(data)

    def add(self, source: Source) -> int:
        self.sources.append(source)
        return len(self.sources) - 1

    def close(self) -> None:
        for source in self.sources:
            source.close()

    def _align(self, source: FileSource, file: TorchFile) -> None:
        """Point storages that do not begin at a multiple of 16 at a source in which they do."""
        odd = [s for s in file.storages if s.begin % 16 and s.nbytes]
        if not odd:
            return
        gathered = Gathered(f"{source.name} (aligned)")
        number = self.add(gathered)
        for storage in odd:
            storage.begin = gathered.add(storage.nbytes, _shifted(source, storage.begin))
            storage.file = number

    def _straighten(self, tensor: StoredTensor) -> None:
        """Point a strided tensor at a source of its own, in which it is contiguous."""
        source = Strided(self.sources[tensor.storage.file], tensor)
        storage = Storage(tensor.dtype, source.nbytes, tensor.storage.key, self.add(source))
        tensor.storage, tensor.offset = storage, 0
        tensor.strides = tuple(prod(tensor.shape[d + 1 :]) for d in range(len(tensor.shape)))


def _shifted(source: FileSource, begin: int) -> Callable[[int, int], bytes]:
    return lambda offset, nbytes: source.range(begin + offset, nbytes)
