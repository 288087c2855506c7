"""On a CUDA device: what an async save costs a real training step, the staging rate, and the first save.

One rank trains a decoder with AdamW. It stands still in the call of a save, and from the end of the backward pass, on
the device's own clock, until the optimizer may change the state; a host that waits while the device computes delays
nothing. The limit is a copy of the same bytes into pinned memory that is used again. The process group is the
launcher's, of one rank: nothing is sent in it. Everything but the calls to `torch.cuda` runs on a CPU, too.
"""

from __future__ import annotations

import math
import os
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.bench import Bench
from benchmarks.limits import TARGET_BYTES, copy_into
from benchmarks.measure import remove_and_settle, rounds
from benchmarks.ours import Ours, OursAsync
from benchmarks.ranks import Measured, Rank
from benchmarks.table import Row, at_most, faster, slowdown
from benchmarks.workload import Block, local_tensors

TO_PINNED, TO_THIRD = 0.05, 1.2
COMPUTE, COMPUTE_SMOKE = 1.0, 0.05
"""Seconds of forward and backward passes in a step, at least: as many micro-batches as that takes."""
BATCH, TIME = 4, 1024  # sequences of a micro-batch, tokens of each
BATCH_SMOKE, TIME_SMOKE = 1, 16
HEAD = 64  # elements of an attention head
FP32_BYTES = 16  # of a parameter with its gradient and both moments
ACTIVATIONS = 16 << 30
SAVES = (1, 2, 3)


def gpu(bench: Bench, device: str = "cuda") -> list[Row]:
    if device == "cuda" and not torch.cuda.is_available():
        print("  skipped: no CUDA device here", file=sys.stderr)
        return []
    measured = bench.launch(1, _measure, device)
    first = Measured(labels={"save 3": "third save", "stall 3": "third save"})
    for _ in range(bench.options.repeats):
        first.extend(bench.launch(1, _measure_first, device))
    size = measured.labels["size"]
    step = f"step of {measured.labels['model']}, {measured.labels['seconds']} of computing"
    return [
        slowdown(
            "gpu", f"async save, stall, {size}", measured, "ours", "pinned", at_most(TO_PINNED)
        ),
        slowdown("gpu", f"{step}, while a save drains", measured, "ours step", "step"),
        faster("gpu", f"staging, {size}", measured, "stage", "pinned"),
        slowdown("gpu", f"first save, {size}", first, "save 1", "save 3", at_most(TO_THIRD)),
        slowdown("gpu", f"stall of the first async save, {size}", first, "stall 1", "stall 3"),
    ]


def _measure(rank: Rank, device: str) -> Measured:
    """Stall, steps and staging against pinned copies, in turns."""
    training = _Training(rank, device)
    ours = OursAsync(training.model, training.optimizer)
    pinned = _PinnedCopy(training)

    def play(_turn: int) -> dict[str, float]:
        found = {"pinned": pinned.run(), "step": training.step()}
        found["ours"], found["ours step"] = _saving_step(rank, training, ours)
        directory = rank.scratch / "staged"
        found["stage"] = ours.staging_seconds(directory)
        remove_and_settle(directory)
        return found

    measured = rounds(rank, play)
    ours.close()
    measured.labels = {
        "size": f"{pinned.nbytes / 1e9:.2f} GB",
        "model": f"{training.num_params / 1e9:.2g}B parameters in {training.dtype_name}",
        "seconds": f"{training.seconds:g} s",
        "pinned": "pinned device-to-host copy of the same bytes",
        "step": "no save under way",
    }
    return measured


def _measure_first(rank: Rank, device: str) -> Measured:
    """The first saves of a process: its buffers are made and pinned in them."""
    training = _Training(rank, device)
    measured = Measured()
    sync = Ours(training.model, training.optimizer)
    for number in SAVES:
        directory = rank.scratch / f"save {number}"
        measured.add(f"save {number}", rank.timed(lambda: sync.save(directory)))  # noqa: B023 - called at once
        remove_and_settle(directory)
    beside = OursAsync(training.model, training.optimizer)
    for number in SAVES:
        measured.add(f"stall {number}", _saving_step(rank, training, beside)[0])
    beside.close()
    rank.say(", ".join(f"{name} {values[-1]:.4f} s" for name, values in measured.samples.items()))
    return measured


def _saving_step(rank: Rank, training: _Training, ours: OursAsync) -> tuple[float, float]:
    """Seconds that a training step with a save before it stood still, and that it took."""
    clock, directory = training.clock, rank.scratch / "beside"
    clock.wait()
    start = time.perf_counter()
    staged, wait = ours.save(directory)
    saved = time.perf_counter()
    training.compute()
    computed = clock.mark()
    staged()
    may_change = clock.mark()
    training.update()
    clock.wait()
    took = time.perf_counter() - start
    wait()
    remove_and_settle(directory)
    return saved - start + clock.between(computed, may_change), took


class _Clock:
    """Marks on the stream of a CUDA device, in the order of its work; on a CPU, marks of time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None

    def wait(self) -> None:
        """Until all that was asked of the device is done."""
        if self._device is not None:
            torch.cuda.synchronize(self._device)

    def mark(self) -> Any:
        if self._device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between(self, first: Any, second: Any) -> float:
        """Seconds. Both marks have been reached: `wait` was called since."""
        if self._device is None:
            return float(second - first)
        return float(first.elapsed_time(second)) / 1000


class _PinnedCopy:
    """The state, copied to the host piece by piece into one pinned buffer."""

    def __init__(self, training: _Training) -> None:
        self._clock = training.clock
        state = local_tensors(training.model, training.optimizer)
        self._parts = [part for _, part, _ in state]
        self.nbytes = sum(part.nbytes for part in self._parts)
        size, on_cuda = min(TARGET_BYTES, self.nbytes), training.device.type == "cuda"
        self._target = torch.zeros(size, dtype=torch.uint8, pin_memory=on_cuda)

    def run(self) -> float:
        """Seconds."""
        self._clock.wait()
        start = time.perf_counter()
        copy_into(self._target, self._parts)
        self._clock.wait()
        return time.perf_counter() - start


class _Training:
    """A decoder that is trained, in fp32 where the device has room for it, else in bf16; products are made in bf16."""

    def __init__(self, rank: Rank, device: str) -> None:
        self.device = torch.device(device)
        self.clock = _Clock(self.device)
        smoke, params = rank.options.smoke, rank.options.gpu_params
        self.seconds = COMPUTE_SMOKE if smoke else COMPUTE
        has_room = params * FP32_BYTES + ACTIVATIONS <= _free_bytes(self.device)
        dtype = torch.float32 if has_room or smoke else torch.bfloat16
        self.dtype_name = (
            str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
        )
        with self.device:
            self.model = _Decoder(params).to(dtype)
            shape = (BATCH_SMOKE, TIME_SMOKE) if smoke else (BATCH, TIME)
            self._tokens = torch.randint(self.model.embed.num_embeddings, shape)
        self.num_params = sum(parameter.numel() for parameter in self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self._count = 1
        self.step()  # makes the optimizer's state
        self._count = max(1, math.ceil(self.seconds / self.step()))

    def compute(self) -> None:
        for _ in range(self._count):
            with torch.autocast(self.device.type, torch.bfloat16):
                self.model(self._tokens).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> float:
        """Seconds of a step without a save."""
        self.clock.wait()
        start = time.perf_counter()
        self.compute()
        self.update()
        self.clock.wait()
        return time.perf_counter() - start


class _Block(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*heads.unbind(), is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Decoder(nn.Module):
    """About `params` parameters (1G: width 2112, 16 blocks); its output is the loss."""

    def __init__(self, params: int) -> None:
        super().__init__()
        layers = 16 if params >= 50_000_000 else 2
        width = HEAD * max(1, round(math.sqrt(params / (12 * layers + 32)) / HEAD))
        self.embed = nn.Embedding(32 * width, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
