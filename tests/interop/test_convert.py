"""DeepSpeed checkpoints as ours: everything bitwise, committed, and loaded by the same training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zero_ckpt
from tests.fp32.peak import peak_of
from tests.interop.cases import Case
from tests.interop.models import LM
from tests.interop.writer import Run, write
from tests.workers import run_ranks
from zero_ckpt import export_fp32
from zero_ckpt.cli import main
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import ConfigurationError, UnsafeObjectError
from zero_ckpt.interop.convert import convert_checkpoint
from zero_ckpt.interop.universal import convert_to_universal

CONVERTED = [
    "accelerate_z3_w2",
    "base_z2_w2_bf16",
    "bn_z2_w2",
    "frozen_z3_w2_bf16",
    "lightning_z2_w2",
    "moe_z1_w2_ep2",
    "pipe_z1_w2_pp2",
    "sched_warmup_z2_w2",
    "tied_z3_w2",
    "tp_mpu_z1_w2_tp2",
    "universal_frozen_z2_w2",
]


@pytest.mark.parametrize("name", CONVERTED)
def test_everything_is_taken_over_bitwise(name: str, deepspeed_cases: Path, tmp_path: Path) -> None:
    case = Case(deepspeed_cases / name)
    folder = convert_checkpoint(case.directory, tmp_path, case.tags[-1], name="converted")
    assert folder == str(tmp_path / "converted")
    with open_checkpoint(case.directory, case.tags[-1]) as old, open_checkpoint(tmp_path) as new:
        for role in ("model", "optim"):
            assert new.keys(role) == old.keys(role)
            for key in old.keys(role):
                assert torch.equal(new.tensor(role, key), old.tensor(role, key)), key
        assert new.objects() == old.objects()
        for part in ("aliases", "step", "zero_stage"):
            assert getattr(new.manifest, part) == getattr(old.manifest, part)
        for part in ("buffers", "frozen"):
            assert sorted(getattr(new.manifest, part)) == sorted(getattr(old.manifest, part))


def test_the_command_converts_and_the_result_verifies_and_loads(
    deepspeed_cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(deepspeed_cases / "base_z3_w2_fp32")
    assert main(["convert", str(case.directory), str(tmp_path / "out"), "--tag", "new"]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "no damage" in capsys.readouterr().out
    model = LM()
    optimizer = torch.optim.AdamW(model.parameters())
    path, _ = zero_ckpt.load_checkpoint(tmp_path / "out", model, optimizer)
    assert path == str(tmp_path / "out" / "new")
    for key, value in case.weights.items():
        assert torch.equal(model.state_dict()[key], value)


def test_the_command_says_when_it_falls_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        zero_ckpt.save_checkpoint(tmp_path / "run", LM(), step=step)
    (tmp_path / "run" / "global_step2" / "manifest.json").write_text("{}")
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert told.err.startswith("zero-ckpt convert: falling back to ")
    assert told.err.count("\n") == 1
    assert "global_step1" in told.out


def test_pickled_client_state_is_refused_by_name_and_leaves_nothing(
    deepspeed_cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Case(deepspeed_cases / "client_class_z2_w2").directory
    with pytest.raises(UnsafeObjectError, match=r"client_state/state.*usertrainer\.TrainState"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert "--allow-pickle" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*pickles")
def test_pickled_client_state_of_ours_is_taken_over_when_that_was_asked_for(tmp_path: Path) -> None:
    model, source = torch.nn.Linear(2, 2), tmp_path / "source"
    optimizer = torch.optim.SGD(model.parameters())
    client_state = {"kind": complex}
    zero_ckpt.save_checkpoint(source, model, optimizer, step=1, client_state=client_state)
    for convert in (convert_checkpoint, convert_to_universal):
        with pytest.raises(UnsafeObjectError, match=r"client_state.*builtins\.type"):
            convert(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    ours = convert_checkpoint(source, tmp_path / "ours", name="a", weights_only=False)
    theirs = convert_to_universal(source, tmp_path / "theirs", name="a", weights_only=False)
    assert (Path(ours).name, Path(theirs).name) == ("a", "a_universal")
    for folder in (ours, theirs):
        result = zero_ckpt.load_checkpoint(folder, model, optimizer, weights_only=False)
        assert result.client_state["kind"] is complex


def peaks_of(source: Path, out: Path) -> list[int]:
    """Memory that each way of opening all of it takes."""
    return [
        peak_of(lambda: export_fp32(source, out / "model.safetensors")),
        peak_of(lambda: export_fp32(source, out / "model.bin")),
        peak_of(lambda: convert_checkpoint(source, out / "ours")),
        peak_of(lambda: convert_to_universal(source, out)),
    ]


@pytest.mark.parametrize("stage", [2, 3])
def test_memory_does_not_grow_with_the_model(stage: int, tmp_path: Path) -> None:
    """Not even with what one rank has of it, which is 117 MB here."""
    group = {f"{i}.weight": torch.full((2048, 2048), float(i)) for i in range(14)}
    write(Run([group], {}, 2, stage, step=None), tmp_path / "theirs" / "t")
    (peaks,) = run_ranks(peaks_of, 1, tmp_path / "theirs" / "t", tmp_path / "out")
    assert max(peaks) < 90 << 20 < sum(value.nbytes for value in group.values()) / 2


def test_a_checkpoint_is_never_converted_onto_itself(deepspeed_cases: Path) -> None:
    source = Case(deepspeed_cases / "base_z2_w2_fp32").directory
    before = sorted(path.name for path in source.rglob("*"))
    with pytest.raises(ConfigurationError, match="in the old one's folder"):
        convert_checkpoint(source, source)
    assert sorted(path.name for path in source.rglob("*")) == before
