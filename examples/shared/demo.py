"""What the demos are made of: a supervised training whose lines are read, and what is printed.

Every act checks what it shows; the first one that fails ends the demo with exit code 1 and the end
of the training's log. A demo ends only processes that it started, and none outlives it.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

CONTEXT = 128  # bytes that the model sees at once
MARKER = ".zero-ckpt-demo"  # a folder that holds it was made by a demo, and may be deleted by it
RUN_LIMIT = 600  # seconds; a training that takes longer has failed
KILL_LIMIT = 60  # seconds in which the other rank must end after one was killed
TOLERANCE = 1e-3  # of a loss, relative: stages and world sizes add up gradients in other orders

RANK_LINE = re.compile(r"rank (\d+) of \d+: process (\d+), step (\d+)")
LOSS_LINE = re.compile(r"step (\d+)  loss (\S+)")


class DemoFailed(Exception):
    """An act did not do what it promises."""


class Training:
    """One run of a training script: its processes, its lines, and the losses read from them.

    `command`: what is run; `shown`: the same as a user types it. `has_launcher`: torchrun starts
    the ranks.
    """

    def __init__(
        self, command: Sequence[str], shown: str, log: Path, *, has_launcher: bool = False
    ) -> None:
        self.has_launcher = has_launcher
        self.log = log
        self.losses: dict[int, float] = {}
        self.process_ids: dict[int, int] = {}  # rank -> process
        self.first_step = 0
        self.timed_out = False
        self.killed_at = math.inf  # by the monotonic clock, s
        say(f"$ {shown}")
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=single_machine_environment(),
                start_new_session=True,
            )
        self.watchdog = self.start_watchdog(RUN_LIMIT)

    def __enter__(self) -> Training:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.watchdog.cancel()
        self.end_all()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def steps(self) -> Iterator[int]:
        """Yield each step whose loss is printed, until every process of the run has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := RANK_LINE.match(line):
                rank, process_id, self.first_step = map(int, found.groups())
                self.process_ids[rank] = process_id
            elif found := LOSS_LINE.match(line):
                self.losses[int(found[1])] = float(found[2])
                yield int(found[1])

    def kill(self, rank: int) -> int:
        """SIGKILL one rank, as the kernel does when memory runs out; return its process id."""
        process_id = self.process_ids[rank]
        os.kill(process_id, signal.SIGKILL)
        self.killed_at = time.monotonic()
        self.watchdog.cancel()
        self.watchdog = self.start_watchdog(KILL_LIMIT)
        return process_id

    def exit_code(self) -> int:
        """Wait for the end of the run, which comes right after `steps` is exhausted."""
        if self.has_launcher:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(KILL_LIMIT)
        self.end_all()
        code = self.process.wait()
        if self.timed_out:
            raise DemoFailed(f"the training did not end within {self.watchdog.interval:.0f} s")
        return code

    def start_watchdog(self, limit: float) -> threading.Timer:
        timer = threading.Timer(limit, self.end_late)
        timer.daemon = True
        timer.start()
        return timer

    def end_late(self) -> None:
        self.timed_out = True
        self.end_all()

    def end_all(self) -> None:
        """End what is left of the run."""
        if self.process.poll() is None and self.has_launcher:
            self.process.terminate()  # torchrun then ends its ranks: they are not of its group
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(KILL_LIMIT)
        # The group's id stays ours for as long as its leader is not waited for.
        if self.process.returncode is None:
            # macOS: PermissionError for a group in which only the dead leader is left.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)


def single_machine_environment() -> dict[str, str]:
    """Return the environment without the traces of a cluster job that the demo may run inside."""
    cluster = re.compile(
        r"SLURM_|TORCHELASTIC_|PL_|(LOCAL_|NODE_|GROUP_)?RANK$|WORLD_SIZE$|MASTER_"
    )
    environment = {name: value for name, value in os.environ.items() if not cluster.match(name)}
    if sys.platform == "linux":  # else gloo asks for the host's name, which not every machine knows
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def describe(path: Path, indent: int) -> str:
    name = " " * indent + path.name
    if path.is_symlink():
        return f"{name} -> {os.readlink(path)}"
    if path.name == "latest":
        return f"{name}: {path.read_text().strip()}"
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    name += "/" if path.is_dir() else ""
    size = sum(file.stat().st_size for file in files)
    return f"{name:40} {size / 1e3:9,.1f} kB"


def prepare(out: Path) -> None:
    """Make `out` an empty folder; refuse to delete anything that the demo has not made."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).exists():
            raise DemoFailed(f"{out} holds files that the demo has not made; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


def show_log(out: Path) -> None:
    """Print the end of the newest training log: the reason of most failures is there."""
    logs = [out / "second-run.log", out / "first-run.log"] if (out / MARKER).exists() else []
    for log in list(filter(Path.exists, logs))[:1]:
        lines = log.read_text(errors="replace").splitlines()
        print(f"the end of {log}:", *lines[-30:], sep="\n  ", file=sys.stderr)


def act(number: int, title: str) -> None:
    print(f"\n{number}. {title}", flush=True)


def say(text: str) -> None:
    print(f"   {text}", flush=True)


def kill_half_way(training: Training, steps: int) -> None:
    """Show the losses of a run, and end rank 1 in the middle of it; the run must fail."""
    kill_after = steps // 2
    for step in training.steps():
        if step in (1, kill_after) or step % (steps // 6) == 0:
            say(f"step {step:3}   loss {training.losses[step]:.4f}")
        if step == kill_after:
            act(2, "Kill one of the two processes, in the middle of an epoch")
            say(f"rank 1 (process {training.kill(rank=1)}) got SIGKILL after step {step}")
    code = training.exit_code()
    if code == 0 or kill_after not in training.losses:
        raise DemoFailed(f"the training ended by itself, with exit code {code}")
    alone = time.monotonic() - training.killed_at
    say(f"rank 0, left alone, ended within {alone + 1:.0f} s: the run is dead")


def follow_resumed(training: Training, steps: int, killed: Training) -> None:
    """Show the losses of a resumed run beside those before the kill; they must agree."""
    for step in training.steps():
        loss = training.losses[step]
        if step in killed.losses:
            say(f"step {step:3}   loss {loss:.4f}   before the kill {killed.losses[step]:.4f}")
        elif step % (steps // 6) == 0:
            say(f"step {step:3}   loss {loss:.4f}")
    code = training.exit_code()
    if code != 0 or steps not in training.losses:
        raise DemoFailed(f"the training ended before step {steps}, with exit code {code}")
    both = sorted(killed.losses.keys() & training.losses.keys())
    if training.first_step == 0 or not both:
        raise DemoFailed(f"resumed at step {training.first_step}: no step to compare")
    apart = max(abs(killed.losses[step] / training.losses[step] - 1) for step in both)
    if apart > TOLERANCE:
        raise DemoFailed(f"losses before the kill and after the resume differ by {apart:.1e}")
    say(f"resumed at step {training.first_step}; the losses of both runs {compared(apart)}")


def compared(apart: float) -> str:
    """How alike losses are that differ by so much, relative."""
    return f"agree to {apart:.0e}" if apart else "are equal"


def arguments_of(out: Path, steps: int, checkpoint_every: int = 0) -> list[str]:
    """What all training scripts are told; a checkpoint at each third unless said otherwise."""
    saves = ["--checkpoint-every", str(checkpoint_every or steps // 3)]
    every = [*saves, "--log-every", str(steps // 30)]
    return ["--steps", str(steps), *every, "--out", str(out)]


def show_folder(folder: Path, tags: Sequence[Path], open_folders: Sequence[Path]) -> None:
    """Print what is in a checkpoint directory; of `open_folders`, every file."""
    say(f"{folder}/")
    for path in [*tags, *sorted(set(folder.iterdir()) - set(tags))]:
        say(describe(path, indent=2))
        if path.is_dir() and path in open_folders:
            for file in sorted(path.iterdir()):
                say(describe(file, indent=6))


def use_the_weights(path: Path, prefix: str = "") -> None:
    """Load an fp32 export into the plain model, judge it on unseen text, and let it write."""
    import torch
    from safetensors.torch import load_file

    from shared.gpt import GPT, loss_of, write
    from shared.text import held_out_windows

    state = {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
    gpt = GPT()
    say(f"GPT().load_state_dict(..., strict=True): {gpt.load_state_dict(state, strict=True)}")
    if any(tensor.dtype != torch.float32 for tensor in state.values()):
        raise DemoFailed(f"{path}: a tensor is not float32")
    guess = math.log(256)
    with torch.no_grad():
        loss = loss_of(gpt, held_out_windows(CONTEXT)[::10]).item()
    say(f"loss on text that it never saw: {loss:.3f} nats per byte (a blind guess: {guess:.3f})")
    if loss > 0.75 * guess:
        raise DemoFailed(f"{path}: the weights are not those of a model that has learned")
    act(6, "What the model writes")
    written = write(gpt, "def read(self, ", 400, CONTEXT).splitlines()
    for line in filter(str.strip, written):
        say(f"| {line.rstrip()[:90]}")


def run_demo(description: str, default_out: str, acts: Callable[[Path, int], None]) -> int:
    """Parse the command line, run the acts, and report: exit code 0, or 1 when an act failed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--out", type=Path, default=Path(default_out), help="(default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=300, help="at least 30 (default: 300)")
    args = parser.parse_args()
    if args.steps < 30:
        parser.error(f"--steps {args.steps}: at least 30 expected")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every training is ended
    started = time.monotonic()
    try:
        prepare(args.out)
        acts(args.out, args.steps)
    except Exception as error:
        show_log(args.out)
        print(f"demo failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"\nDone in {time.monotonic() - started:.0f} s. To look around:")
    say(f"python -m zero_ckpt ls {args.out / 'checkpoints'}")
    return 0
