"""Everything that takes a checkpoint takes DeepSpeed's: the command line, sharded jobs, tags and retention."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import zero_ckpt
from tests.interop.cases import Case
from tests.interop.models import LM, Odd
from tests.interop.writer import Run, write
from tests.workers import run_ranks
from zero_ckpt import Checkpointer, get_fp32_state_dict_from_zero_checkpoint
from zero_ckpt.cli import main
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import CorruptCheckpointError, StateMismatchError


def a_run(**options: object) -> Run:
    return Run(
        [{"weight": torch.randn(4, 3), "bias": torch.randn(4)}], {}, 2, 2, step=None, **options
    )  # type: ignore[arg-type]


def test_ls_and_inspect_show_the_tags(
    deepspeed_cases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Case(deepspeed_cases / "twotags_z2_w2").directory
    assert main(["ls", str(directory), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(tag["tag"], tag["step"], tag["latest"]) for tag in listed["tags"]] == [
        ("global_step2", 2, False),
        ("global_step4", 4, True),
    ]
    assert main(["inspect", str(directory)]) == 0
    shown = capsys.readouterr().out
    assert "format      DeepSpeed" in shown
    assert "deepspeed 0.19.8" in shown
    assert "blocks.{0..1}.qkv.weight" in shown
    assert "XXH3" not in shown  # there are none


def test_lost_files_of_all_tags_are_told_with_one_advice(
    deepspeed_cases: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(Case(deepspeed_cases / "twotags_z2_w2").directory, directory)
    for path in list(directory.glob("*/*_rank_1_*optim_states.pt")):
        path.unlink()
    with pytest.raises(CorruptCheckpointError, match="no checkpoint here is whole") as raised:
        zero_ckpt.get_fp32_state_dict_from_zero_checkpoint(directory)
    assert str(raised.value).count("rank 1") == 2
    assert str(raised.value).endswith("data-parallel ranks. Restore the files from a copy.")
    assert str(raised.value).count("Restore") == 1


def test_looking_at_it_imports_no_torch(deepspeed_cases: Path) -> None:
    directory = Case(deepspeed_cases / "client_rich_z2_w2").directory
    code = (
        "import sys; from zero_ckpt.cli import main\n"
        f"for command in ('ls', 'inspect', 'verify'): assert main([command, {str(directory)!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def load_sharded(directory: str) -> dict[str, torch.Tensor]:
    model = LM()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    zero_ckpt.load_checkpoint(directory, model, optimizer)
    moments = [optimizer.state[p] for p in model.parameters()]
    assert all(isinstance(state["exp_avg"], DTensor) for state in moments)
    assert all(float(state["step"]) == 3.0 for state in moments)
    names = [name for name, _ in model.named_parameters()]
    found = {
        f"{n}/exp_avg": s["exp_avg"].full_tensor() for n, s in zip(names, moments, strict=True)
    }
    return found | {n: p.full_tensor().detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["base_z2_w2_fp32", "base_z3_w4_bf16"])
def test_a_sharded_job_of_another_size_takes_its_part(name: str, deepspeed_cases: Path) -> None:
    case = Case(deepspeed_cases / name)
    for found in run_ranks(load_sharded, 3, str(case.directory)):
        for key, value in case.weights.items():
            assert torch.equal(found[key], value)
        for key, value in case.optimizer["state"]["exp_avg"].items():
            assert torch.equal(found[f"{key}/exp_avg"], value)


def test_latest_universal_counts_where_there_is_no_latest(
    deepspeed_cases: Path, tmp_path: Path
) -> None:
    directory = Path(
        shutil.copytree(Case(deepspeed_cases / "universal_z2_w2").directory, tmp_path / "d")
    )
    assert open_checkpoint(directory).tag == "global_step3"
    (directory / "latest").unlink()
    assert open_checkpoint(directory).tag == "global_step3_universal"


def test_a_tag_may_be_a_path_as_deepspeed_lets_it_be(tmp_path: Path) -> None:
    write(a_run(), tmp_path / "runs" / "best")
    (tmp_path / "latest").write_text("runs/best")
    for tag in (None, "runs/best"):
        assert set(get_fp32_state_dict_from_zero_checkpoint(tmp_path, tag)) == {"weight", "bias"}


def test_damage_falls_back_to_an_older_tag_with_a_warning(tmp_path: Path) -> None:
    write(a_run(), tmp_path / "global_step1")
    write(a_run(), tmp_path / "global_step2")
    (tmp_path / "latest").write_text("global_step2")
    path = tmp_path / "global_step2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"falling back to .*global_step1.*zero_pp_rank_1"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)


def test_our_saves_beside_it_never_touch_its_files(tmp_path: Path) -> None:
    """Not by retention, not by taking a tag's own folder."""
    write(a_run(), tmp_path / "global_step1")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.pt")}
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters())
    with Checkpointer(model, optimizer, keep_last=1) as checkpointer:
        for tag in ("global_step1", "global_step2", "global_step3"):
            checkpointer.save_checkpoint(tmp_path, tag)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.pt")} == before


def test_another_class_of_optimizer_is_refused(deepspeed_cases: Path) -> None:
    model = LM()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        StateMismatchError, match="the optimizer was AdamW when it was saved and is SGD"
    ):
        zero_ckpt.load_checkpoint(
            Case(deepspeed_cases / "base_z2_w2_fp32").directory,
            model,
            torch.optim.SGD(model.parameters()),
        )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_scheduler_s_state_arrives(deepspeed_cases: Path) -> None:
    model = LM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1)
    directory = Case(deepspeed_cases / "sched_torch_z3_w2").directory
    zero_ckpt.load_checkpoint(directory, model, optimizer, scheduler)
    assert scheduler.last_epoch == 3
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    assert optimizer.param_groups[0]["lr"] < 0.5


def load_in_accelerate(directory: str) -> tuple[dict[str, torch.Tensor], int, float]:
    from accelerate import Accelerator

    import zero_ckpt.accelerate

    accelerator = Accelerator(cpu=True)
    zero_ckpt.accelerate.attach(accelerator)
    model = Odd()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    accelerator.load_state(directory)
    weights = accelerator.unwrap_model(model).state_dict()
    return weights, scheduler.scheduler.last_epoch, optimizer.param_groups[0]["lr"]


def test_what_accelerate_saved_with_deepspeed_loads_in_accelerate(deepspeed_cases: Path) -> None:
    case = Case(deepspeed_cases / "accelerate_z3_w2")
    for weights, epoch, lr in run_ranks(load_in_accelerate, 2, str(case.directory)):
        assert all(torch.equal(weights[key], value) for key, value in case.weights.items())
        assert epoch == 3
        assert lr == pytest.approx(0.001)
