from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.checkpoints import Net
from tests.cli.conftest import Command, flip
from zero_ckpt import get_fp32_state_dict_from_zero_checkpoint


def test_exported_weights_load_into_a_plain_model(
    sharded: Path, tmp_path: Path, command: Command
) -> None:
    result = command("export", sharded, tmp_path / "fp32")
    assert (result.status, result.err) == (0, "")
    path = tmp_path / "fp32" / "model.safetensors"
    assert result.lines[1].split()[0] == str(path)
    assert result.lines[-1].startswith(f"from {sharded}/global_step200, ")
    weights = load_file(path)
    Net().load_state_dict(weights, strict=True)
    expected = get_fp32_state_dict_from_zero_checkpoint(sharded)
    assert all(torch.equal(weights[key], value) for key, value in expected.items())


def test_options_reach_the_export(sharded: Path, tmp_path: Path, command: Command) -> None:
    options = ["--format", "bin", "--dtype", "bf16", "--exclude-frozen"]
    options += ["--strip-prefix", "blocks."]
    document = command(
        "export", sharded / "global_step100", tmp_path / "out", *options, "--json"
    ).document
    assert document["checkpoint"] == f"{sharded}/global_step100"
    (file,) = document["files"]
    weights = torch.load(file["path"], weights_only=True)
    assert weights["0.weight"].dtype == torch.bfloat16
    assert "norm.bias" not in weights


def test_large_exports_are_split(sharded: Path, tmp_path: Path, command: Command) -> None:
    result = command("export", sharded, tmp_path / "out", "--max-shard-size", "500B")
    assert result.status == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_a_fallback_is_told_in_one_line(sharded: Path, tmp_path: Path, command: Command) -> None:
    (sharded / "global_step200" / "manifest.json").unlink()
    result = command("export", sharded, tmp_path / "out")
    assert result.status == 0
    assert result.err.startswith("zero-ckpt export: falling back to ")
    assert result.err.count("\n") == 1


def test_damage_leaves_no_output(sharded: Path, tmp_path: Path, command: Command) -> None:
    flip(sharded / "global_step200" / "model-00000-of-00002.safetensors", 4200)
    result = command("export", sharded / "global_step200", tmp_path / "out")
    assert (result.status, result.out, result.err.count("\n")) == (1, "", 1)
    assert "checksum" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("allowed", [False, True])
def test_pickles_are_opened_only_when_allowed(
    allowed: bool, pickled: Path, trace: Path, tmp_path: Path, command: Command
) -> None:
    options = ["--allow-pickle"] if allowed else []
    result = command("export", pickled, tmp_path / "w.ckpt", *options)
    assert result.status == (0 if allowed else 2), result.err
    assert trace.exists() is allowed
    assert ("--allow-pickle" in result.err) is not allowed
    assert "weights_only" not in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}", "{out}/a", "--max-shard-size", "5XB"], "5XB"),
        (["{run}/nothing", "{out}/a"], "nothing"),
        (["{run}", "/proc/no/such"], "/proc/no/such"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(
    arguments: list[str], words: str, sharded: Path, tmp_path: Path, command: Command
) -> None:
    result = command("export", *(a.format(run=sharded, out=tmp_path) for a in arguments))
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert words in result.err


def test_advice_names_the_options_of_the_command_line(
    sharded: Path, tmp_path: Path, command: Command
) -> None:
    result = command("export", sharded, tmp_path / "a.ckpt")
    assert "use --format bin or --format safetensors" in result.err
    result = command("export", sharded, tmp_path / "b", "--max-shard-size", "many")
    assert "--max-shard-size is a number" in result.err


@pytest.mark.parametrize("output", ["", "model-00000-of-00002.safetensors"])
def test_a_checkpoint_is_never_overwritten_by_its_own_export(
    output: str, sharded: Path, command: Command
) -> None:
    folder = sharded / "global_step100"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = command("export", folder, folder / output, "--max-shard-size", "2KB")
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert f"such as '{sharded}/fp32'" in result.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
