"""DeepSpeed's universal layout, written: read back bitwise, whatever the checkpoint was, and complete or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import zero_ckpt
from tests.interop.cases import Case
from tests.interop.writer import Run, write
from zero_ckpt.cli import main
from zero_ckpt.core.checkpoint import Checkpoint, open_checkpoint
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.errors import ConfigurationError, StateMismatchError
from zero_ckpt.interop.universal import convert_to_universal

SOURCES = [
    "align_z2_w2",
    "base_z2_w2_bf16",
    "bn_z2_w2",
    "frozen_z3_w2_bf16",
    "groups_z3_w2",
    "lightning_z2_w2",
    "moe_z1_w2_ep2",
    "odd_z3_w4",
    "roundrobin_z2_w2",
    "sgd_z2_w2",
    "subgroup_z3_w2",
    "tied_z3_w2",
    "tp_mpu_z1_w2_tp2",
    "universal_frozen_z2_w2",
]


def assert_same(old: Checkpoint, new: Checkpoint) -> None:
    for role in ("model", "optim"):
        assert set(new.keys(role)) == set(old.keys(role))
        for key in old.keys(role):
            assert new.placed(role, key).dtype == old.placed(role, key).dtype
            assert torch.equal(new.tensor(role, key), old.tensor(role, key)), key
    was, now = old.objects(), new.objects()
    for part in ("client_state", "global_step", "lr_schedulers"):
        assert now[part] == was[part]
    assert now["optimizers"][""]["groups"] == was["optimizers"][""]["groups"]
    assert new.manifest.aliases == old.manifest.aliases
    assert set(new.manifest.buffers) == set(old.manifest.buffers)
    assert set(new.manifest.frozen) == set(old.manifest.frozen)


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_written_is_read_back_bitwise(
    name: str, deepspeed_cases: Path, tmp_path: Path
) -> None:
    case = Case(deepspeed_cases / name)
    folder = Path(convert_to_universal(case.directory, tmp_path, case.tag))
    assert (tmp_path / "latest_universal").read_text() == folder.name == f"{case.tag}_universal"
    with open_checkpoint(case.directory, case.tag) as old, open_checkpoint(tmp_path) as new:
        assert_same(old, new)


def test_tensor_files_have_deepspeed_s_own_content(deepspeed_cases: Path, tmp_path: Path) -> None:
    """Those that DeepSpeed's converter made of the same checkpoint."""
    case = Case(deepspeed_cases / "universal_z2_w2")
    mine = Path(convert_to_universal(case.directory, tmp_path, case.tag))
    theirs = case.directory / case.tags[-1]
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("zero/*/*.pt"))
    assert files == sorted(path.relative_to(mine) for path in mine.rglob("zero/*/*.pt"))
    for file in files:
        expected = torch.load(theirs / file, weights_only=False)
        found = torch.load(mine / file, weights_only=True)
        if isinstance(expected, dict):
            assert found["cat_dim"] == expected["cat_dim"]
            expected, found = expected["param"], found["param"]
        assert found.shape == expected.shape
        assert torch.equal(found, expected)


def test_ours_by_the_command(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    zero_ckpt.save_checkpoint(
        tmp_path / "ours", model, optimizer, tag="t", client_state={"epoch": 2}
    )
    assert (
        main(["convert", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "universal"]) == 0
    )
    with open_checkpoint(tmp_path / "ours") as old, open_checkpoint(tmp_path / "out") as new:
        for role in ("model", "optim"):
            for key in old.keys(role):
                assert torch.equal(new.tensor(role, key), old.tensor(role, key))
        assert new.objects()["client_state"] == {"epoch": 2}


def test_a_checkpoint_from_before_the_first_step_converts_into_a_folder_of_any_name(
    tmp_path: Path,
) -> None:
    """DeepSpeed's converter does not find state 0, nor the rank in `a+b(1)`, and puts `latest_universal` inside."""
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    zero_ckpt.save_checkpoint(tmp_path / "ours", model, optimizer, tag="t", step=0)
    folder = convert_to_universal(tmp_path / "ours", f"{tmp_path}/a+b(1)/")
    assert sorted(os.listdir(tmp_path / "a+b(1)")) == ["latest_universal", "t_universal"]
    assert folder == str(tmp_path / "a+b(1)" / "t_universal")
    fresh = torch.nn.Linear(4, 3)
    anew = torch.optim.AdamW(fresh.parameters())
    zero_ckpt.load_checkpoint(tmp_path / "a+b(1)", fresh, anew)
    assert torch.equal(fresh.weight, model.weight)
    assert not anew.state


def test_every_name_is_durable_before_the_folder_appears(
    deepspeed_cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(deepspeed_cases / SOURCES[0])
    names: dict[Path, set[str]] = {}
    sync = LocalStorage.sync

    def noted(self: LocalStorage, path: str) -> None:
        names[Path(path)] = set(os.listdir(path))
        sync(self, path)

    monkeypatch.setattr(LocalStorage, "sync", noted)
    folder = Path(convert_to_universal(case.directory, tmp_path, case.tag))
    written = folder.with_name(f".{folder.name}.partial")
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        assert names[written / path.relative_to(folder)] == set(os.listdir(path))


def test_an_existing_folder_is_never_replaced(deepspeed_cases: Path, tmp_path: Path) -> None:
    case = Case(deepspeed_cases / "sgd_z2_w2")
    convert_to_universal(case.directory, tmp_path)
    with pytest.raises(ConfigurationError, match="exists already"):
        convert_to_universal(case.directory, tmp_path)


def test_a_name_that_leads_out_of_the_folder_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    write(Run([{"../../out": torch.randn(3)}], {}, 2, 2, step=None), tmp_path / "source" / "tag")
    with pytest.raises(StateMismatchError, match="cannot be the name of a folder"):
        convert_to_universal(tmp_path / "source", tmp_path / "universal", "tag")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
