"""Opening a checkpoint: what the user's path becomes for Lightning, the same on every rank.

A folder of ours becomes Lightning's dict, whose tensors are lazy, once the ranks have verified every byte of it in
shares. A file goes to the `CheckpointIO`. Owns the checkpoint from then on, until all is restored and what hooks have
kept of it is read.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from zero_ckpt.core.binding import named, prefix_of
from zero_ckpt.core.checkpoint import Checkpoint
from zero_ckpt.core.control import meet_json
from zero_ckpt.core.loading import load_together
from zero_ckpt.core.notices import warn_on_first
from zero_ckpt.core.per_rank import client_state_notice, own_client_state, read_own, read_rank
from zero_ckpt.core.places import absolute
from zero_ckpt.core.reader import Sharing
from zero_ckpt.core.restoring import Restoration
from zero_ckpt.core.shares import verify_share
from zero_ckpt.core.tag_folder import is_tag_folder, nothing_at
from zero_ckpt.errors import DisagreementError
from zero_ckpt.lightning import paths
from zero_ckpt.lightning.base import StrategyBase
from zero_ckpt.lightning.checkpoint_io import ZeroCheckpointIO
from zero_ckpt.lightning.content import from_checkpoint
from zero_ckpt.lightning.kept import HandedOut
from zero_ckpt.lightning.optimizers import Pristine
from zero_ckpt.lightning.ranks import PARTS, restore_rank
from zero_ckpt.lightning.wanted import PER_RANK, leave_out

__all__ = ["OpenMixin"]


class OpenMixin(StrategyBase):
    """Overrides of the strategy that open and close a checkpoint."""

    _zero_source: Checkpoint | None = None
    _zero_handed_out: HandedOut | None = None
    _zero_pristine: tuple[Pristine, ...] = ()
    _zero_asked = False

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Lightning's checkpoint dict from a folder of ours (lazily) or a file that Lightning wrote.

        Collective. `weights_only` None or True refuses objects that were stored as pickles. Raises the same error on
        every rank: `CheckpointNotFoundError`, `CorruptCheckpointError`, `FormatVersionError`, `UnsafeObjectError` or
        `DisagreementError`.
        """
        self._zero_asked = True
        self.wait_for_saves()
        path = self._agreed_path(os.fspath(checkpoint_path)) or ""
        self.close_checkpoint()
        if not self._is_ours(path):
            return self._only_wanted(self._load_file(path, weights_only))
        refuses_pickles = weights_only is not False
        loaded = load_together(
            self.engine.storage,
            self.control,
            path,
            None,
            lambda checkpoint: self._describe(checkpoint, refuses_pickles),
            timeout=self.save_timeout,
        )
        self._zero_source = loaded.checkpoint
        content, own, notice = loaded.prepared
        self._tell([notice])
        self._zero_handed_out = HandedOut(content)
        content = self._only_wanted(content)
        self._zero_pristine = tuple(
            Pristine.of(loaded.checkpoint, prefix_of(name), state)
            for name, state in named(content.get("optimizer_states"), "optimizers").items()
        )
        if self.is_fitting and not self.wanted.load_module_only:
            self._zero_resumption = restore_rank(
                loaded.checkpoint,
                own,
                content,
                self.global_rank,
                self.world_size,
                self.root_device,
                self._current_trainer().accumulate_grad_batches,
            )
        return content

    def _describe(
        self, checkpoint: Checkpoint, weights_only: bool
    ) -> tuple[Restoration, tuple[dict[str, Any], dict[str, Any], str]]:
        """Verify this rank's share. Returns an empty plan, and what follows from it.

        That is Lightning's dict, what a rank had stored for itself that this one continues with, and a notice for the
        user.
        """
        with_optimizers = self.is_fitting and self.wanted.optimizers
        roles = ("model", "optim", "state") if with_optimizers else ("model", "state")
        verify_share(checkpoint, roles, self.control, self.replicated)
        version = self.namespace.version
        content = from_checkpoint(
            checkpoint, version, weights_only, with_optimizers=with_optimizers
        )
        own = read_own(checkpoint, self.control, weights_only, {})
        mine = own_client_state(checkpoint, self.control, own)
        if mine is not None:
            content[PER_RANK] = mine
        notice = client_state_notice(checkpoint, self.world_size, own)
        if self.is_fitting and not self.wanted.load_module_only:
            rank = self.global_rank % checkpoint.manifest.world_size
            own = read_rank(checkpoint, rank, weights_only, PARTS)
        return Restoration(), (content, own, notice)

    @property
    def replicated(self) -> Sharing | None:
        """Below stage 2 all ranks read the same weights: from the disk once, then from the page cache."""
        several = self.stage < 2 and self.world_size > 1
        return Sharing(0, 1, frozenset({"model", "optim"})) if several else None

    def _only_wanted(self, content: dict[str, Any]) -> dict[str, Any]:
        """Without what a fit was not asked to restore."""
        if self.is_fitting:
            datamodule = getattr(self._current_trainer(), "datamodule", None)
            parts = [type(part).__qualname__ for part in (self.precision_plugin, datamodule)]
            leave_out(content, self.wanted, parts)
        return content

    def _tell(self, notices: list[str]) -> None:
        warn_on_first(self.global_rank, notices)

    def _is_ours(self, path: str) -> bool:
        """Whether to read `path` as a sharded checkpoint; another plugin may write folders too."""
        if not paths.is_checkpoint_folder(path):
            return False
        io = self.checkpoint_io
        return isinstance(io, ZeroCheckpointIO) or is_tag_folder(self.engine.storage, path)

    def _load_file(self, path: str, weights_only: bool | None) -> dict[str, Any]:
        torch.cuda.empty_cache()
        paths.refuse_export(path)
        try:
            content: dict[str, Any] = self.checkpoint_io.load_checkpoint(
                path, weights_only=weights_only
            )
        except FileNotFoundError as error:
            raise nothing_at(self.engine.storage, absolute(path)) from error
        return content

    def _agreed_path(self, path: str | None) -> str | None:
        """Rank 0's path. Raises when some ranks found a checkpoint and others none."""

        def decide(given: list[Any]) -> Any:
            none = [rank for rank, each in enumerate(given) if each is None]
            if none and len(none) < len(given):
                found = next(each for each in given if each is not None)
                raise DisagreementError(
                    f"ckpt_path names '{found}' on some ranks, and on ranks {none} there is no "
                    "checkpoint to resume from. Give the path itself, on a file system that all "
                    "ranks share."
                )
            return given[0]

        timeout = self.save_timeout
        agreed: str | None = meet_json(self.control, "resume: path", path, decide, timeout)
        return agreed

    def agree_nothing_to_restore(self) -> None:
        """Meet the ranks that found a checkpoint, if this one found none and so did not open any."""
        if not self._zero_asked:
            self._zero_asked = True
            self._agreed_path(None)

    def read_what_is_kept(self) -> None:
        """Collective: all is restored. What hooks still hold of the checkpoint is read now."""
        handed_out, self._zero_handed_out = self._zero_handed_out, None
        source = self._zero_source
        self._zero_pristine = ()
        if handed_out is not None and source is not None:
            beat = self.control.beat  # somebody may have kept much
            self._together("resume: what hooks kept", lambda: handed_out.read_kept(source, beat))
            source.close()

    def close_checkpoint(self) -> None:
        """Forget the checkpoint that was loaded last."""
        source, self._zero_source = self._zero_source, None
        self._zero_handed_out = None
        self._zero_pristine = ()
        if source is not None:
            source.close()
