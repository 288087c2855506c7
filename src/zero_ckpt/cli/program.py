"""The command line's grammar, and what becomes of errors.

Exit status: 0 all is well; 1 damage was found; 2 it could not be done. Every error is one line on the error stream.
Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence

from zero_ckpt import __version__
from zero_ckpt.cli import clean, convert, export, inspect, ls, repair, verify
from zero_ckpt.cli.text import printable
from zero_ckpt.errors import CorruptCheckpointError, ZeroCkptError

__all__ = ["main"]

DAMAGE, FAILURE = 1, 2

_COMMANDS = {
    "ls": ls,
    "inspect": inspect,
    "verify": verify,
    "repair": repair,
    "clean": clean,
    "export": export,
    "convert": convert,
}

_DESCRIPTION = "Look at, verify, repair, clean up, export and convert sharded training checkpoints, DeepSpeed's too."
_EPILOG = """\
examples:
  zero-ckpt ls checkpoints                                which checkpoints there are
  zero-ckpt inspect checkpoints/global_step100            what one holds, and who wrote it
  zero-ckpt verify checkpoints                            read every byte of every tag
  zero-ckpt repair checkpoints                            rebuild a lost manifest.json
  zero-ckpt clean checkpoints                             what killed saves have left there
  zero-ckpt export checkpoints model.safetensors          full fp32 weights of the latest
  zero-ckpt convert deepspeed_run checkpoints             DeepSpeed's latest as one of ours

exit status: 0 all is well, 1 damage was found, 2 it could not be done (no checkpoint there, wrong usage, full disk)
an error is one line on the error stream, with --json too: then there is no document"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. `arguments` default to the process's own."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return FAILURE
    if "" in (options.path, getattr(options, "output", None)):
        parser.error("a path is empty: '.' is the folder you are in")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal's encoding lacks is shown escaped, not an error.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status: int = _COMMANDS[options.command].run(options)
        print(end="", flush=True)
    except BrokenPipeError:
        # The reader (`head`, `less`) has gone. The interpreter must not try to flush again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ZeroCkptError, OSError, MemoryError) as error:
        text = printable(" ".join(str(error).split())) or "out of memory"
        print(f"zero-ckpt {options.command}: {text}", file=sys.stderr)
        return DAMAGE if isinstance(error, CorruptCheckpointError) else FAILURE
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zero-ckpt",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, command in _COMMANDS.items():
        part = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=f"examples:\n{command.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.configure(part)
        part.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser
