"""`zero-ckpt convert SRC DST`: a checkpoint of DeepSpeed's as one of ours, or of ours as one of DeepSpeed's."""

from __future__ import annotations

import argparse
import time

from zero_ckpt.cli.notices import find_source, for_people
from zero_ckpt.cli.text import duration_text, json_text, printable, size_text
from zero_ckpt.core.places import AnyStorage
from zero_ckpt.core.storage import Storage

SUMMARY = "copy a checkpoint, DeepSpeed's too, as one of ours or for DeepSpeed"
DESCRIPTION = """\
Writes a checkpoint with everything in it (weights, optimizer state, scheduler, client state) as a tag of another
checkpoint directory, committed and with checksums, in one process and with little memory. Values are taken over
bitwise. A tag of that name is replaced. Of a checkpoint directory: its latest. DeepSpeed itself is not needed."""
EXAMPLES = """\
  zero-ckpt convert deepspeed_run checkpoints
  zero-ckpt convert deepspeed_run/global_step100 checkpoints --tag step100
  zero-ckpt convert checkpoints deepspeed_run --to universal      for DeepSpeed's load_universal"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="SRC", help="a tag's folder, or a checkpoint directory")
    parser.add_argument("output", metavar="DST", help="checkpoint directory to write to")
    parser.add_argument(
        "--to",
        choices=["zero_ckpt", "universal"],
        default="zero_ckpt",
        help="our format, or DeepSpeed's universal one, for DeepSpeed to load",
    )
    parser.add_argument("--tag", metavar="NAME", help="of the new checkpoint (default: as it was)")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="open pickled objects of the client state: can run code",
    )


def run(options: argparse.Namespace) -> int:
    source = find_source("convert", options.path)
    # Needs torch; only now, when there is something to convert.
    from zero_ckpt.interop.convert import convert_checkpoint
    from zero_ckpt.interop.universal import convert_to_universal

    begin = time.monotonic()
    convert = convert_to_universal if options.to == "universal" else convert_checkpoint
    with for_people("convert"):
        folder = convert(
            source, options.output, name=options.tag, weights_only=not options.allow_pickle
        )
    nbytes = _nbytes(AnyStorage(), folder)
    if options.json:
        print(json_text({"source": source, "path": folder, "nbytes": nbytes}))
        return 0
    seconds = time.monotonic() - begin
    print(f"{printable(folder)}  {size_text(nbytes)}")
    print(f"\nfrom {printable(source)}, in {duration_text(seconds)}")
    return 0


def _nbytes(storage: Storage, folder: str) -> int:
    """Bytes of all files in a folder and below."""
    entries = storage.list(folder)
    return sum(_nbytes(storage, f"{folder}/{e.name}") if e.is_dir else e.nbytes for e in entries)
