"""Tags, directories and arguments of a `Checkpointer`: what is where, what is kept, what is refused. In one process."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.small import (
    Factored,
    Holder,
    files,
    one_step,
    same,
    two_layers,
)
from zero_ckpt import (
    Checkpointer,
    export_fp32,
    get_fp32_state_dict_from_zero_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from zero_ckpt.cli.program import main
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import ConfigurationError


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = Factored(model.parameters())
    one_step(model, optimizer)
    for name in ("one", "other"):
        save_checkpoint(tmp_path / name, model, optimizer, step=1, client_state={"s": {"a", "b"}})
    one, other = (files(tmp_path / name / "global_step1") for name in ("one", "other"))
    manifests = [json.loads(found.pop("manifest.json"))["manifest"] for found in (one, other)]
    assert one == other
    for manifest in manifests:
        del manifest["created"], manifest["timings"]
    assert manifests[0] == manifests[1]


def test_a_tag_can_be_overwritten_and_keeps_one_generation(tmp_path: Path) -> None:
    model = Holder(w=torch.zeros(2))
    for number in range(1, 4):
        model.w.data.fill_(number)
        save_checkpoint(tmp_path, model, tag="t", step=number)
        names = set(files(tmp_path / "t"))
        suffix = f".g{number}" if number > 1 else ""
        assert names == {
            "manifest.json",
            *(f"{r}-00000-of-00001{suffix}.safetensors" for r in ("model", "state")),
        }
        assert open_checkpoint(tmp_path).manifest.generation == number
    load_checkpoint(tmp_path, model)
    assert model.w.tolist() == [3, 3]


def test_files_of_others_survive_the_overwriting_of_their_tag(tmp_path: Path) -> None:
    checkpointer = Checkpointer(nn.Linear(2, 2))
    checkpointer.save_checkpoint(tmp_path, tag="t")
    mine = tmp_path / "t" / "adapter_model.safetensors"
    mine.write_bytes(b"mine")
    stale = tmp_path / "t" / "model-00000-of-00009.safetensors"
    stale.write_bytes(b"of a save that never committed")
    checkpointer.save_checkpoint(tmp_path, tag="t")
    assert mine.read_bytes() == b"mine"
    assert not stale.exists()


def test_objects_in_each_others_place_are_refused() -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters())
    with pytest.raises(ConfigurationError, match=r"model: found SGD.* The order is model, optim"):
        Checkpointer(optimizer, net)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="optimizer: found StepLR"):
        Checkpointer(net, [torch.optim.lr_scheduler.StepLR(optimizer, 1)])  # type: ignore[list-item]
    wrapper: Any = type("Wrapper", (), {"param_groups": optimizer.param_groups})()
    with pytest.raises(
        ConfigurationError, match="optimizer: found Wrapper, which has no register_st"
    ):
        Checkpointer(net, wrapper)


def test_keep_last_removes_the_oldest_committed_checkpoints(tmp_path: Path) -> None:
    model = Holder(w=torch.zeros(2))
    (tmp_path / "global_step99").mkdir()
    (tmp_path / "global_step99" / "model-00000-of-00001.safetensors").write_bytes(b"not committed")
    with Checkpointer(model, keep_last=2) as checkpointer:
        for step in range(5):
            checkpointer.save_checkpoint(tmp_path, step=step)
    assert {p.name for p in tmp_path.iterdir()} == {
        "global_step3",
        "global_step4",
        "global_step99",
        "latest",
    }
    with pytest.raises(ConfigurationError, match="keep_last"):
        Checkpointer(model, keep_last=0)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\nb", "%d {x} ü".encode(), b"y" * 200], ids=repr)
def test_directories_of_any_name(name: bytes, tmp_path: Path) -> None:
    place = os.fsencode(tmp_path) + b"/" + name
    model, other = two_layers(), two_layers(1)
    save_checkpoint(os.fsdecode(place), model, tag="t")
    load_checkpoint(os.fsdecode(place), other)
    load_checkpoint(place, other)  # type: ignore[arg-type]
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(
        get_fp32_state_dict_from_zero_checkpoint(os.fsdecode(place)), dict(model.state_dict())
    )
    out = os.fsdecode(place) + "/out.bin"
    export_fp32(os.fsdecode(place), out)
    assert same(torch.load(out), dict(model.state_dict()))
    for command in ("ls", "inspect", "verify"):
        assert main([command, os.fsdecode(place)]) == 0


def test_a_path_that_no_file_system_knows_is_refused(tmp_path: Path) -> None:
    for call in (save_checkpoint, load_checkpoint):
        with pytest.raises(ConfigurationError, match=r"x\\x00y': a path cannot hold"):
            call(f"{tmp_path}/x\0y", two_layers(), tag="t")


def test_latest_moves_only_when_asked(tmp_path: Path) -> None:
    model = Holder(w=torch.zeros(2))
    save_checkpoint(tmp_path, model, tag="first", step=1)
    save_checkpoint(tmp_path, model, tag="aside", step=2, save_latest=False)
    assert (tmp_path / "latest").read_text() == "first\n"
    assert load_checkpoint(tmp_path, model)[0] == str(tmp_path / "first")
    assert load_checkpoint(tmp_path / "aside", model)[0] == str(tmp_path / "aside")


def test_steps_name_the_tag(tmp_path: Path) -> None:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    checkpointer = Checkpointer(model, optimizer)
    for _ in range(3):
        one_step(model, optimizer)
    assert checkpointer.save_checkpoint(tmp_path).tag == "global_step3"
    checkpointer.close()
    one_step(model, optimizer)
    assert checkpointer.global_step == 3
    with pytest.raises(ConfigurationError, match="tag= or step="):
        save_checkpoint(tmp_path, model)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": {"a/b": nn.Linear(1, 1)}}, "names of models"),
        ({"model": nn.Linear(1, 1), "tag_validation": "maybe"}, "tag_validation"),
        ({"model": nn.Linear(1, 1), "keep_last": 2.5}, "keep_last must be at least 1 or None"),
        ({"model": nn.Linear(1, 1), "timeout": -1}, "timeout=-1: expected a number of seconds"),
        ({"model": nn.Linear(1, 1), "zero_stage": 5}, "zero_stage=5: expected 0, 1, 2, 3"),
        ({"model": nn.Linear(1, 1), "engine": "asnyc"}, "engine='asnyc': expected 'sync'"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Checkpointer(**arguments)


@pytest.mark.parametrize("step", [-1, 1.5, "3", None])
def test_a_step_that_no_manifest_could_hold_is_refused(step: Any, tmp_path: Path) -> None:
    model = Holder(w=torch.zeros(2))
    with pytest.raises(
        ConfigurationError, match=r"step must be a natural number|needs tag= or step="
    ):
        save_checkpoint(tmp_path / "new", model, tag=None if step is None else "t", step=step)
    assert not (tmp_path / "new").exists()
    save_checkpoint(tmp_path, model, step=np.int64(3))  # type: ignore[arg-type]
    assert open_checkpoint(tmp_path).manifest.step == 3


def test_a_missing_latest_falls_back_with_a_warning(tmp_path: Path) -> None:
    model = Holder(w=torch.zeros(2))
    for step in (1, 2):
        save_checkpoint(tmp_path, model, step=step)
    (tmp_path / "latest").unlink()
    with pytest.warns(UserWarning, match="latest"):
        path, _ = load_checkpoint(tmp_path, model)
    assert path == str(tmp_path / "global_step2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(tmp_path, model, tag="global_step1")
