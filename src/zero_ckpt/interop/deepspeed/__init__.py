"""DeepSpeed's checkpoints, read: a format of `zero_ckpt.core.foreign`.

ZeRO stage 0 to 3, in fp32, fp16 and bf16, of any number of ranks, with pipeline and tensor parallelism and experts, and
universal checkpoints. Nothing of DeepSpeed or torch is imported, and no code of a checkpoint is run.

    names, records, pickle_machine, pickle_reader,
    pickle_writer, plain, torch_files, sources,
    file_table                                             files: what they are called, their pickles, their bytes
    tensors, column                                        where a tensor's elements are; what one rank's files hold
    zero12, zero3, unsharded, matching, moe, experts,
    universal                                              the layouts of the stages
    pipeline, parallel, grid                               model-parallel ranks put together
    save, modules, folder, optimizers, objects,
    state_file, content                                    a whole tag, in the core's terms
"""

from __future__ import annotations

from collections.abc import Sequence

from zero_ckpt.core.foreign import ForeignManifest
from zero_ckpt.core.storage import Storage
from zero_ckpt.interop.deepspeed.names import is_deepspeed

__all__ = ["open_tag", "recognises"]


def recognises(files: Sequence[str]) -> bool:
    """Whether a folder with files of these names is one that DeepSpeed saved a tag in."""
    return is_deepspeed(files)


def open_tag(storage: Storage, folder: str) -> ForeignManifest:
    """What the tag in `folder` holds. Reads the files' pickles, and no tensor.

    Raises `CorruptCheckpointError` for files that are damaged, missing or not of one save, `StateMismatchError` where
    they do not say how tensors were split, and `UnsafeObjectError` for a pickle that was made to do harm.
    """
    from zero_ckpt.interop.deepspeed.content import describe_tag

    return describe_tag(storage, folder)
