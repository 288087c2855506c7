"""Collapse to files: a sharded checkpoint into one full state dict on disk, streamed, by one rank or by many.

1. start   rank 0 finds the checkpoint and makes room for the files
2. write   every rank assembles and writes its part of the bytes, and makes it durable
3. done    when all ranks succeeded rank 0 puts the files in place; else they are removed and every rank raises

So the output is complete or absent, and every rank gets the same outcome. An export that was interrupted leaves what it
had finished of several files, and the same one, run again, goes on from there: see `journal`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.control import ControlPlane, LocalControl, meet_json
from zero_ckpt.core.finding import Found, fallback_notice, find_checkpoint
from zero_ckpt.core.notices import warn_on_first
from zero_ckpt.core.places import AnyStorage, absolute
from zero_ckpt.core.tag_folder import was_replaced
from zero_ckpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DisagreementError,
    RankTimeoutError,
    SaveError,
    ZeroCkptError,
    first_told,
)
from zero_ckpt.fp32.contents import Contents, Options
from zero_ckpt.fp32.destination import check_destination, folders_to_make, remove_empty
from zero_ckpt.fp32.identity import export_key, source_state
from zero_ckpt.fp32.journal import Journal
from zero_ckpt.fp32.lanes import Progress, ShareWriter, lanes_of, shared_files
from zero_ckpt.fp32.publishing import Output, output_of

__all__ = ["export_fp32"]


def export_fp32(
    checkpoint_dir: str | os.PathLike[str],
    output: str | os.PathLike[str],
    tag: str | int | None = None,
    *,
    format: str | None = None,
    max_shard_size: int | str | None = None,
    exclude_frozen_parameters: bool = False,
    strip_prefix: str | None = None,
    dtype: str = "fp32",
    weights_only: bool = True,
    progress: Progress | None = None,
    control: ControlPlane | None = None,
    timeout: float | None = None,
) -> list[str]:
    """Write the full state dict of a checkpoint to `output`; returns the paths of the files, an index file last.

    `checkpoint_dir`, `tag`: as for `get_fp32_state_dict_from_zero_checkpoint`, whose tensors these are.
    `output`: a folder, or a file with the suffix of a format; a path or a URL. A `/` at its end makes it a folder, and
    suffixes of other kinds of files, such as `.onnx`, are refused. An earlier result of that name is
    replaced at the end. A checkpoint's folder is refused, since shard files have such names, too.
    `format`: `safetensors` (`model.safetensors`), `bin` (`pytorch_model.bin`, for `torch.load`) or `ckpt`
    (`model.ckpt`, for Lightning's `load_from_checkpoint`); None: by the suffix, where `.pt` and `.pth` stand for `bin`,
    else `safetensors`.
    `max_shard_size`: bytes, or a text like `5GB`; more than that becomes several files and a Hugging Face index.
    `strip_prefix`: names that start with it lose it. `dtype`: `fp32`, `bf16`, `fp16` or `keep`, of floating parameters.
    `weights_only=False` allows pickled objects in what `bin` and `ckpt` take over, whose opening can run code.
    `progress(done, total)`: bytes of this rank's part, after every few MiB, on threads of the export, one at a time.
    `control`: the ranks that share the work; all make the same call. `timeout`: seconds of silence after which one of
    them counts as lost. Without it this process works alone.

    Tied weights: `bin` and `ckpt` store them once; `safetensors`, which cannot, under each of their names, so that
    every format loads with `strict=True`. Modules' extra state, which `safetensors` cannot hold, is left out there,
    with a warning. Peak memory is about 150 MB, whatever the model's size. Every byte read is verified.

    After an interruption (a kill, a lost rank, Ctrl-C) of an export to several files, the same call writes only those
    that were not finished, and reads the others once more to be sure of them. It is the same call when the checkpoint
    is unchanged and the options are these. Any other call writes all files, and so does one after an error.

    Raises `ConfigurationError`, `CheckpointNotFoundError`, `CorruptCheckpointError`, `FormatVersionError`,
    `UnsafeObjectError`, `DisagreementError`, `RankTimeoutError`, or `SaveError` when the output cannot be written.
    """
    options = Options(
        output_of(output, format),
        max_shard_size,
        exclude_frozen_parameters,
        strip_prefix,
        dtype,
        weights_only,
    )
    source = absolute(checkpoint_dir), None if tag is None else str(tag)
    export = _Export(options, control or LocalControl(), timeout, progress or (lambda *_: None))
    return export.run(*source)


class _Export:
    def __init__(
        self, options: Options, control: ControlPlane, timeout: float | None, progress: Progress
    ) -> None:
        self._options, self._control, self._progress = options, control, progress
        self._timeout = timeout
        self._output: Output = options.output
        self._storage = AnyStorage()
        self._contents: Contents | None = None
        self._journal: Journal | None = None
        self._made: list[str] = []
        self._is_unchanged: Callable[[], bool] = lambda: True

    def run(self, path: str, tag: str | None) -> list[str]:
        try:
            return self._run(path, tag)
        except BaseException as error:
            if self._control.rank == 0 and self._journal is not None:
                with suppress(OSError):
                    self._clean_up(self._journal, error)
                remove_empty(self._made)
            raise
        finally:
            if self._contents is not None:
                self._contents.checkpoint.close()

    def _run(self, path: str, tag: str | None) -> list[str]:
        asked = [path, tag, self._options.as_record()]
        start = self._meet("export: start", asked, self._start)
        warn_on_first(self._control.rank, start["notices"])
        problem: list[str] = []
        cause: Exception | None = None
        try:
            self._write(self._open(start["folder"]), start)
        except Exception as error:
            cause, problem = error, _problem(self._explained(error), self._output)
        try:
            done = self._meet("export: done", problem, self._finish)
        except ZeroCkptError as error:
            raise error from cause
        paths: list[str] = done["paths"]
        return paths

    def _meet(
        self, phase: str, record: Any, decide: Callable[[list[Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        found: dict[str, Any] = meet_json(self._control, phase, record, decide, self._timeout)
        return found

    def _open(self, folder: str) -> Contents:
        if self._contents is None:
            self._contents = Contents(Checkpoint(self._storage, folder), self._options)
        return self._contents

    def _explained(self, error: Exception) -> Exception:
        """`error`, or another one where what looks like damage is a job that has replaced the checkpoint meanwhile."""
        if self._contents is None or not isinstance(error, CorruptCheckpointError):
            return error
        known = self._contents.checkpoint
        was = was_replaced(self._storage, known.path, known.manifest)
        return _replaced(known.path) if was else error

    def _start(self, asked: list[Any]) -> dict[str, Any]:
        """Rank 0: find the checkpoint, and make the files that several ranks will write parts of."""
        try:
            return self._begin(asked)
        except CorruptCheckpointError as error:
            raise self._explained(error) from error.__cause__

    def _begin(self, asked: list[Any]) -> dict[str, Any]:
        odd = {rank: record for rank, record in enumerate(asked) if record != asked[0]}
        if odd:
            raise DisagreementError(
                f"ranks were asked for different exports: rank 0: {asked[0]}; {odd}. Pass the same arguments on each."
            )
        path, tag, _ = asked[0]
        check_destination(self._storage, self._output)
        found, state, contents = self._find(path, tag)
        self._is_unchanged = lambda: source_state(found.folder, found.manifest) == state
        sizes = [contents.layout(file).nbytes for file in range(len(contents.names))]
        key, nonce = export_key(contents, self._options, state), uuid.uuid4().hex[:8]
        self._made = folders_to_make(self._output.folder)
        journal = self._journal = Journal(self._storage, self._output, key, nonce)
        try:
            kept = journal.take_over(contents.names, sizes, self._control.beat)
            for file in shared_files(lanes_of(contents, self._control.world_size, kept)):
                self._storage.create(journal.path(contents.names[file]), sizes[file]).finish(
                    sizes[file]
                )
        except OSError as error:
            if isinstance(error, ZeroCkptError):
                raise
            raise _as_save_error(error, self._output) from error
        notices = [fallback_notice(found.problems, found.folder)] if found.problems else []
        return {
            "folder": found.folder,
            "state": state,
            "key": key,
            "nonce": nonce,
            "kept": kept,
            "notices": notices + contents.notices(),
        }

    def _find(self, path: str, tag: str | None) -> tuple[Found, str | None, Contents]:
        """Rank 0: the checkpoint, its state before it was opened, and what is in it."""
        while True:
            found = find_checkpoint(self._storage, path, tag)
            state = source_state(found.folder, found.manifest)
            try:
                return found, state, self._open(found.folder)
            except (CheckpointNotFoundError, CorruptCheckpointError):
                if not was_replaced(self._storage, found.folder, found.manifest):
                    raise

    def _write(self, contents: Contents, start: dict[str, Any]) -> None:
        is_known = self._control.rank > 0 and start["state"] is not None
        if is_known and export_key(contents, self._options, start["state"]) != start["key"]:
            raise _replaced(start["folder"])
        journal = Journal(self._storage, self._output, start["key"], start["nonce"])
        lanes = lanes_of(contents, self._control.world_size, start["kept"])
        writer = ShareWriter(self._storage, contents, journal, self._advance)
        writer.write(lanes, self._control.rank)

    def _advance(self, done: int, total: int) -> None:
        self._control.beat()
        self._progress(done, total)

    def _finish(self, problems: list[Any]) -> dict[str, Any]:
        """Rank 0: put the files in place, or raise the first rank's problem."""
        if (told := first_told(problems)) is not None:
            raise told
        assert self._contents is not None
        assert self._journal is not None
        if not self._is_unchanged():
            raise _replaced(self._contents.checkpoint.path)
        journal = self._journal
        finished = {name: journal.finished(name) for name in self._contents.names}
        try:
            old = journal.replace(self._output.old_files(self._storage))
            paths = self._output.publish(self._storage, finished, self._contents.index, old)
            journal.clear(all_of_it=True)
            return {"paths": paths}
        except OSError as error:
            raise SaveError(
                f"export to {self._output.path}: putting the finished files in place: {error}. Check which result is "
                "there, or export again; the checkpoint is intact."
            ) from error

    def _clean_up(self, journal: Journal, error: BaseException) -> None:
        """After an error leave nothing; after an interruption leave what the same export can go on from."""
        interrupted = isinstance(error, RankTimeoutError) or not isinstance(error, Exception)
        if not interrupted or self._contents is None:
            journal.clear()
            return
        contents = self._contents
        journal.clear_unfinished(
            {name: contents.layout(file).nbytes for file, name in enumerate(contents.names)}
        )


def _problem(error: Exception, output: Output) -> list[str]:
    if not isinstance(error, ZeroCkptError):
        error = _as_save_error(error, output)
    return [type(error).__name__, str(error)]


def _replaced(folder: str) -> SaveError:
    return SaveError(
        f"{folder}: it was replaced or changed while it was exported, or ranks see different checkpoints there. "
        "Nothing was put in place, and an earlier result is untouched: export again."
    )


def _as_save_error(error: Exception, output: Output) -> SaveError:
    return SaveError(
        f"export to {output.path}: {type(error).__name__}: {error}. Nothing was put in "
        "place, and an earlier result there is untouched; the checkpoint is intact."
    )
