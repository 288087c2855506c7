"""What a save beside the training holds, whatever happens to the live state before it is staged."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.decoupled.jobs import Gate, same, saved_behind, storage
from tests.workers import run_ranks
from zero_ckpt import AsyncSave, Checkpointer, SaveHandle, load_checkpoint
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import SaveError, StateMismatchError


def held_back(
    model: nn.Module, directory: Path, engine: str | AsyncSave = "async"
) -> tuple[Gate, SaveHandle]:
    """A save of tag `a`, of which nothing is staged before the gate is opened."""
    gate = Gate()
    checkpointer = Checkpointer(model, engine=engine, storage=storage(gate, "create"))
    handle = checkpointer.save_checkpoint(directory, tag="a")
    assert gate.reached.wait(20)
    return gate, handle


def stored(directory: str | Path, tag: str) -> dict[str, torch.Tensor]:
    with open_checkpoint(directory, tag) as checkpoint:
        return {key: checkpoint.tensor("model", key) for key in checkpoint.keys("model")}


# Several engines of one job


def _two_engines(directory: str) -> list[list[float]]:
    """Both save at once, again and again, and one is made anew each time, as in a notebook."""
    models = [nn.Linear(512, 512, bias=False) for _ in range(2)]
    for number, model in enumerate(models):
        nn.init.constant_(model.weight, number)
    first = Checkpointer(models[0], engine="async", timeout=20)
    for turn in range(4):
        second = Checkpointer(models[1], engine="async", timeout=20)
        handles = [
            checkpointer.save_checkpoint(f"{directory}/{number}", tag=f"{turn}")
            for number, checkpointer in enumerate((first, second))
        ]
        for handle in handles:
            handle.wait()
    if dist.get_rank():
        return []
    return [
        stored(f"{directory}/{number}", str(turn))["weight"].unique().tolist()
        for number in range(2)
        for turn in range(4)
    ]


def test_engines_of_one_job_do_not_hear_each_other(tmp_path: Path) -> None:
    values, _ = run_ranks(_two_engines, 2, str(tmp_path))
    assert values == [[0.0]] * 4 + [[1.0]] * 4


# Memory that is taken from a parameter


def _load_by_another(directory: str) -> list[bool]:
    """While nothing of a save is staged, which then is what it was."""
    gate, run, _ = saved_behind(directory)
    gate.open()
    run.step()
    before = run.state()
    run.checkpointer.wait()
    held = Gate()
    run.checkpointer = Checkpointer(
        run.model, run.optimizer, engine="async", storage=storage(held, "create"), timeout=20
    )
    run.save(directory, "b")
    assert held.reached.wait(20)
    threading.Timer(0.3, held.open).start()
    load_checkpoint(directory, run.model, run.optimizer, tag="a")
    has_loaded = not same(run.state(), before)
    run.checkpointer.load_checkpoint(directory, tag="b")
    return [has_loaded, same(run.state(), before)]


def test_a_load_by_another_door_waits_until_all_is_copied(tmp_path: Path) -> None:
    assert run_ranks(_load_by_another, 2, str(tmp_path)) == [[True, True]] * 2


def _exchange(parameter: nn.Parameter) -> None:
    parameter.data = torch.full_like(parameter, 7)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda model: model.half(),
    "exchanged": lambda model: [_exchange(p) for p in model.parameters()],
    "emptied": lambda model: [setattr(p, "data", torch.empty(0)) for p in model.parameters()],
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_memory_that_is_taken_from_a_parameter_stays_until_it_is_staged(
    what: str, tmp_path: Path
) -> None:
    model = nn.Linear(1024, 1024)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gate, handle = held_back(model, tmp_path)
    CHANGES[what](model)
    gate.open()
    handle.wait()
    assert same(stored(tmp_path, "a"), before)


def _sharded_in_other_memory(directory: str, changed: bool) -> Any:
    """A DTensor is exchanged whole, with what counts its changes."""
    model = nn.Linear(64, 64)
    fully_shard(model)
    if not changed:
        with torch.no_grad():
            model.weight.mul_(2)  # as an optimizer that has made a step
    before = model.weight.full_tensor().clone()
    gate, handle = held_back(model, Path(directory))
    if changed:
        with torch.no_grad():
            model.weight.add_(1)
    model.half()
    gate.open()
    if changed:
        with pytest.raises(StateMismatchError, match="'weight'"):
            handle.wait()
        return True
    handle.wait()
    return torch.equal(stored(directory, "a")["weight"], before)


class Operations(TorchDispatchMode):
    """Counts operations on DTensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += DTensor in types
        return func(*args, **(kwargs or {}))


def _operations_of_a_save(directory: str) -> int:
    model = nn.Linear(64, 64)
    fully_shard(model)
    with Operations() as operations:
        gate, handle = held_back(model, Path(directory))
    gate.open()
    handle.wait()
    return operations.count


def test_a_save_of_sharded_weights_does_nothing_slow_for_each(tmp_path: Path) -> None:
    """An operation on a DTensor takes 10 us and more, and the training waits for the capture of all."""
    assert run_ranks(_operations_of_a_save, 2, str(tmp_path)) == [0, 0]


@pytest.mark.parametrize("changed", [False, True], ids=["exchanged", "changed before"])
def test_memory_that_is_taken_from_a_sharded_parameter_stays_until_it_is_staged(
    changed: bool, tmp_path: Path
) -> None:
    assert run_ranks(_sharded_in_other_memory, 2, str(tmp_path), changed) == [True, True]


# A frozen copy that the forward moves after the weights


class Student(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.own = nn.Linear(64, 64)
        self.teacher = nn.Linear(64, width).requires_grad_(False)


def _move_teacher(model: Student, tmp_path: Path) -> None:
    gate, handle = held_back(model, tmp_path)
    with torch.no_grad():
        model.teacher.weight.mul_(0.5)
    gate.open()
    handle.wait()


def test_a_teacher_is_saved_as_it_was(tmp_path: Path) -> None:
    model = Student(64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _move_teacher(model, tmp_path)
    assert same(stored(tmp_path, "a"), before)


def test_a_large_frozen_base_is_not_copied_at_once_and_is_watched(tmp_path: Path) -> None:
    with pytest.raises(StateMismatchError, match=r"'teacher\.weight'"):
        _move_teacher(Student(128), tmp_path)


def test_changes_before_the_staging_are_found_by_check_staging(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    gate, handle = held_back(model, tmp_path, AsyncSave(check_staging=True))
    model.weight.data.add_(1)
    gate.open()
    with pytest.raises(StateMismatchError, match="'weight'"):
        handle.wait()


# Steps that are given a closure


class Own(torch.optim.SGD):
    """Changes weights before it calls the closure, as some optimizers do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(1)
        with torch.enable_grad():
            return closure()


def _closure_step(directory: str, by_keyword: bool) -> bool:
    gate, run, before = saved_behind(directory)

    def closure() -> torch.Tensor:
        gate.open()  # a step that waited before this would wait for ever
        run.optimizer.zero_grad()
        loss: torch.Tensor = run.model(torch.randn(16, 8)).pow(2).mean()
        loss.backward()
        return loss

    if by_keyword:
        run.optimizer.step(closure=closure)  # type: ignore[arg-type]
    else:
        run.optimizer.step(closure)  # type: ignore[arg-type]
    assert not same(run.state(), before)
    run.checkpointer.wait()
    run.checkpointer.load_checkpoint(directory)
    return same(run.state(), before)


@pytest.mark.parametrize("by_keyword", [True, False])
def test_a_step_with_a_closure_waits_when_it_has_computed_gradients(
    tmp_path: Path, by_keyword: bool
) -> None:
    assert run_ranks(_closure_step, 2, str(tmp_path), by_keyword) == [True, True]


def test_an_optimizer_of_the_users_waits_before(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = Own(model.parameters(), lr=1.0)
    gate, handle = held_back(model, tmp_path)
    threading.Timer(0.2, gate.open).start()
    optimizer.step(lambda: model(torch.ones(64)).sum())
    handle.wait()
    assert same(stored(tmp_path, "a"), before)


# More at once than there is room for


def test_what_has_no_room_is_staged_before_the_save_returns(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    model.register_buffer("large", torch.rand(8 << 20))  # 32 MiB
    engine = AsyncSave(staging_bytes=24 << 20)
    with Checkpointer(model, engine=engine) as checkpointer:
        before = model.large.clone()
        checkpointer.save_checkpoint(tmp_path, tag="a")
        model.large.zero_()
    assert torch.equal(stored(tmp_path, "a")["large"], before)


def test_memory_of_what_is_copied_at_once_is_used_again(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    model.register_buffer("large", torch.rand(1 << 20))
    with Checkpointer(model, engine="async") as checkpointer:
        copies = checkpointer._engine._copies  # type: ignore[attr-defined]
        for number in range(3):
            model.large.fill_(number)
            checkpointer.save_checkpoint(tmp_path, tag=f"{number}")
            model.large.fill_(-1)
            checkpointer.wait()
            kept = [tensor for tensors in copies._spare.values() for tensor in tensors]
            assert [tensor.numel() for tensor in kept] == [1 << 20]
    for number in range(3):
        assert stored(tmp_path, str(number))["large"].unique().tolist() == [number]


def test_the_error_of_a_block_is_not_hidden_by_that_of_its_save(tmp_path: Path) -> None:
    def fail(operation: Any) -> None:
        raise OSError(28, "No space left on device", operation.path)

    checkpointer = Checkpointer(nn.Linear(2, 2), engine="async", storage=storage(fail, "write"))

    def fall_over() -> None:
        with checkpointer:
            checkpointer.save_checkpoint(tmp_path, tag="a")
            raise KeyError("mine")

    with pytest.warns(UserWarning, match="No space left"), pytest.raises(KeyError, match="mine"):
        fall_over()
    with pytest.raises(SaveError), checkpointer:
        checkpointer.save_checkpoint(tmp_path, tag="a")


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_steps_while_its_parent_saves(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    gate, handle = held_back(model, tmp_path)
    child = multiprocessing.get_context("fork").Process(target=optimizer.step)
    child.start()
    child.join(20)
    ended = child.exitcode
    child.kill()
    gate.open()
    handle.wait()
    assert ended == 0
