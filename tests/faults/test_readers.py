"""A load, a collapse or a command while somebody else overwrites, retires or removes what it reads, at each step."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.jobs import Job
from tests.told import warned
from zero_ckpt import export_fp32, get_fp32_state_dict_from_zero_checkpoint
from zero_ckpt.cli.program import main
from zero_ckpt.core import places
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.retention import remove_tag
from zero_ckpt.errors import CheckpointNotFoundError, SaveError, ZeroCkptError
from zero_ckpt.testing import FaultyStorage, Operation

READS = frozenset({"get", "list", "open", "read"})


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """Two checkpoints, of which `step2` is the latest."""
    for step in (1, 2):
        Job.at(step).save(tmp_path / "start")
    return tmp_path / "start"


def load_disturbed(
    directory: Path, disturb: Callable[[], None], number: int, tag: str | None
) -> tuple[str, str | None, bool]:
    """A load before whose operation `number` somebody disturbs: (state afterwards, error, whether it got that far)."""
    log: list[Operation] = []

    def hook(operation: Operation) -> None:
        log.append(operation)
        if operation.number == number:
            disturb()

    job = Job.at(0, storage=FaultyStorage(LocalStorage(), hook, names=READS))
    error = None
    try:
        warned(job.load, directory, **({} if tag is None else {"tag": tag}))
    except ZeroCkptError as raised:
        error = type(raised).__name__
    return job.bits(), error, len(log) > number


def sweep(
    start: Path, disturb: Callable[[Path], None], tag: str | None
) -> set[tuple[str, str | None]]:
    """Every (state, error) that a load may end with."""
    ends = set()
    directory = start.with_name("run")
    for number in range(1_000):
        shutil.copytree(start, directory)
        state, error, disturbed = load_disturbed(directory, lambda: disturb(directory), number, tag)
        shutil.rmtree(directory)
        if not disturbed:
            assert number > 15
            return ends
        ends.add((state, error))
    raise AssertionError("it never ends")


def overwrite(directory: Path) -> None:
    Job.at(5).save(directory, tag="step2")


def retire(directory: Path) -> None:
    """What retention does in the end: a newer checkpoint, and the others are removed."""
    Job.at(5, keep_last=1).save(directory, tag="step5")


def remove(directory: Path) -> None:
    remove_tag(LocalStorage(), str(directory), "step2")


def test_a_save_of_a_new_tag_does_not_look_into_the_others(start: Path) -> None:
    seen: list[str] = []
    storage = FaultyStorage(LocalStorage(), lambda o: seen.append(o.path), names=READS)
    Job.at(5, storage=storage).save(str(start), tag="step5")
    assert [path for path in seen if path.startswith(f"{start}/step5")]
    assert not [path for path in seen if path.startswith((f"{start}/step1", f"{start}/step2"))]


@pytest.mark.parametrize("tag", [None, "step2"])
def test_a_load_during_an_overwrite_gets_the_old_or_the_new_state(
    tag: str | None, start: Path
) -> None:
    old, new = Job.at(2).bits(), Job.at(5).bits()
    assert sweep(start, overwrite, tag) == {(old, None), (new, None)}


def test_a_load_during_retention_gets_a_checkpoint(start: Path) -> None:
    old, new = Job.at(2).bits(), Job.at(5).bits()
    assert sweep(start, retire, None) == {(old, None), (new, None)}


def test_a_load_during_a_removal_gets_it_or_another_one(start: Path) -> None:
    whole = {(Job.at(2).bits(), None), (Job.at(1).bits(), None)}
    assert sweep(start, remove, None) == whole


def test_a_load_of_a_tag_that_is_removed_gets_it_or_is_told(start: Path) -> None:
    whole, absent = (Job.at(2).bits(), None), (Job.at(0).bits(), CheckpointNotFoundError.__name__)
    assert sweep(start, remove, "step2") == {whole, absent}


def collapsed(directory: Path) -> str:
    return bits_of(get_fp32_state_dict_from_zero_checkpoint(directory))


def exported(directory: Path) -> str:
    out = directory.with_name("out.safetensors")
    export_fp32(directory, out)
    return bits_of(load_file(out))


def bits_of(tensors: dict[str, torch.Tensor]) -> str:
    return str([(key, tensors[key].tolist()) for key in sorted(tensors)])


def shown(command: str, directory: Path) -> str:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([command, str(directory)])
    text = out.getvalue() + err.getvalue()
    return f"{status}" if status or "damage" in text.lower().replace("no damage", "") else "fine"


READERS: dict[str, Callable[[Path], str]] = {
    "fp32": collapsed,
    "export": exported,
    **{name: partial(shown, name) for name in ("ls", "inspect", "verify")},
}


@pytest.mark.parametrize("disturb", [overwrite, retire])
@pytest.mark.parametrize("name", READERS)
def test_no_reader_takes_what_a_running_job_does_for_damage(
    name: str, disturb: Callable[[Path], None], start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export is told what happened, where it had begun."""
    ends: set[str] = set()
    directory = start.with_name("run")
    expected, left = {READERS[name](start)}, -1

    def hook(_: Operation) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            disturb(directory)

    faulty = partial(FaultyStorage, LocalStorage(), hook, names=READS)
    monkeypatch.setattr(places, "LocalStorage", faulty)
    for number in range(1_000):
        shutil.copytree(start, directory)
        left = number
        try:
            ends.add(warned(READERS[name], directory)[0])
        except SaveError as error:
            ends.add(str(error).partition(": ")[2][:41])
        if left >= 0:  # it had ended before
            break
        left = -1
        expected.add(READERS[name](directory))
        shutil.rmtree(directory)
    assert number > 3
    assert ends - {"it was replaced or changed while it was e"} == expected
