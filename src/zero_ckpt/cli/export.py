"""`zero-ckpt export PATH OUT`: the full fp32 weights of a checkpoint, collapsed from its shards."""

from __future__ import annotations

import argparse
import time

from zero_ckpt.cli.notices import find_source, for_people
from zero_ckpt.cli.progress import Progress
from zero_ckpt.cli.text import duration_text, json_text, printable, size_text, table
from zero_ckpt.core.places import AnyStorage

SUMMARY = "collapse a checkpoint into full fp32 weights"
DESCRIPTION = """\
Writes the full fp32 weights of a checkpoint, collapsed from the shards of all ranks, in one process and with little
memory. Every byte read is verified. For a checkpoint directory: of its latest. An earlier result in OUT is replaced,
when the new one is whole. After an interruption run the same command again: it goes on after the last whole file of
several, if the checkpoint and the options are the same, and starts anew otherwise.

OUT is a file when its suffix is .safetensors, .bin, .pt or .pth (both as .bin), or .ckpt, and else a folder, such as
run.v1. What exists as a folder, or ends in a slash, is a folder in any case. Suffixes of other kinds of files, such as
.onnx or .h5, are refused, and so is the folder of a checkpoint."""
EXAMPLES = """\
  zero-ckpt export checkpoints fp32                              a folder: fp32/model.safetensors
  zero-ckpt export checkpoints weights.pt                        one file, its format by the suffix: for torch.load
  zero-ckpt export checkpoints/global_step100 fp32 --max-shard-size 5GB"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a tag's folder, or a checkpoint directory")
    parser.add_argument(
        "output", metavar="OUT", help="folder, or file with a format's suffix; may be a URL"
    )
    parser.add_argument(
        "--format",
        choices=["safetensors", "bin", "ckpt"],
        help="default: by OUT's suffix, else safetensors",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="such as 5GB: more becomes several files and an index",
    )
    parser.add_argument(
        "--exclude-frozen",
        action="store_true",
        help="leave out what was not trained",
    )
    parser.add_argument(
        "--strip-prefix", metavar="TEXT", help="names that start with it lose it: 'model.'"
    )
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16", "keep"],
        default="fp32",
        help="of floating parameters (default: fp32)",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="open pickled objects that bin and ckpt take over: can run code",
    )


def _size(path: str) -> int:
    file = AnyStorage().open(path)
    file.close()
    return file.nbytes


def run(options: argparse.Namespace) -> int:
    source = find_source("export", options.path)
    # Needs torch; only now, when there is something to export.
    from zero_ckpt.fp32 import export_fp32

    begin = time.monotonic()
    with for_people("export"), Progress("exporting") as progress:
        paths = export_fp32(
            source,
            options.output,
            format=options.format,
            max_shard_size=options.max_shard_size,
            exclude_frozen_parameters=options.exclude_frozen,
            strip_prefix=options.strip_prefix,
            dtype=options.dtype,
            weights_only=not options.allow_pickle,
            progress=progress.set,
        )
    sizes = {path: _size(path) for path in paths}
    if options.json:
        files = [{"path": path, "nbytes": nbytes} for path, nbytes in sizes.items()]
        print(json_text({"checkpoint": source, "files": files}))
        return 0
    rows = [[printable(path), size_text(nbytes)] for path, nbytes in sizes.items()]
    print("\n".join(table(("FILE", "SIZE"), rows, right="SIZE")))
    seconds = time.monotonic() - begin
    print(f"\nfrom {printable(source)}, in {duration_text(seconds)}")
    return 0
