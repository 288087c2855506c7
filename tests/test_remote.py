"""Whole checkpoints in an object store, through every door: what works on a disk works there."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zero_ckpt
from tests.faults.jobs import SHORT, Job, Raised, contents, raised
from tests.object_server import BUCKET, Request, S3Server
from tests.told import warned
from tests.workers import run_ranks
from zero_ckpt.cli import main
from zero_ckpt.core.control import control_for_process_group
from zero_ckpt.core.places import AnyStorage, absolute
from zero_ckpt.core.retention import remove_tag
from zero_ckpt.errors import CheckpointNotFoundError, ConfigurationError, CorruptShardError

WORLD = 2


@pytest.fixture(scope="module")
def module_server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


storage = AnyStorage()


@pytest.fixture
def server(module_server: S3Server) -> Iterator[S3Server]:
    module_server.requests.clear()
    yield module_server
    module_server.fault = lambda _: ""
    storage.remove(f"s3://{BUCKET}/run")
    assert module_server.keys() == module_server.unfinished() == []


RUN = f"s3://{BUCKET}/run"


def save_and_overwrite(directory: str, **options: Any) -> list[str]:
    """Two tags, one of them saved twice; what a load of each gives back."""
    for step, tag in ((1, "first"), (2, "second"), (3, "second")):
        Job.at(step, sharded=True, **options).save(directory, tag=tag)
    found = []
    for tag in ("first", "second"):
        job = Job.at(0, sharded=True)
        job.load(directory, tag=tag)
        found.append(job.bits())
    return found


def bits_at(step: int) -> str:
    return Job.at(step, sharded=True).bits()


def exported(folder: str) -> list[str]:
    """Names of what lies in a folder."""
    return [entry.name for entry in storage.list(folder)]


def load_elsewhere(directory: str) -> str:
    """At another world size and stage; the model's bits."""
    job = Job.at(0)
    _, texts = warned(job.load, directory)
    assert all("random number generators" in text for text in texts)
    return str({key: value.tolist() for key, value in job.model.state_dict().items()})


def test_ranks_save_overwrite_load_and_reshard(server: S3Server) -> None:
    found = run_ranks(save_and_overwrite, WORLD, RUN)
    for step, at in ((1, 0), (3, 1)):
        assert [each[at] for each in found] == run_ranks(bits_at, WORLD, step)
    [model] = run_ranks(load_elsewhere, 1, RUN)
    job = Job.at(3)
    assert model == str({key: value.tolist() for key, value in job.model.state_dict().items()})
    generations = {key for key in server.keys() if "second" in key}  # noqa: SIM118 - no dict
    assert all(".g2." in key for key in generations if "safetensors" in key)
    assert server.unfinished() == []


def test_nothing_is_committed_before_the_manifest_is_put(server: S3Server) -> None:
    Job.at(1).save(RUN, tag="tag")
    puts = [r.path for r in server.requests if r.method == "PUT"]
    assert puts[-2:] == [f"/{BUCKET}/run/tag/manifest.json", f"/{BUCKET}/run/latest"]
    before = contents(RUN)
    server.fault = lambda r: "refuse" if r.method == "PUT" and "manifest" in r.path else ""
    error = raised(Job.at(2).save, RUN, tag="tag")
    assert error.kind == "SaveError"
    assert f"{RUN}/tag/manifest.json: told to. Nothing was committed" in error.text
    assert contents(RUN) == before
    assert not [key for key in server.keys() if ".g2." in key]  # noqa: SIM118


def save_large(directory: str) -> Raised:
    return raised(Job.at(1, width=700_000, timeout=SHORT).save, directory, tag="tag")


def test_a_save_whose_parts_are_refused_fails_on_every_rank_and_leaves_nothing(
    server: S3Server,
) -> None:
    server.fault = lambda r: "refuse" if r.is_part and "partNumber=2" in r.query else ""
    errors = run_ranks(save_large, WORLD, RUN)
    assert errors[0] == errors[1]
    assert errors[0].kind == "SaveError"
    assert "told to" in errors[0].text
    assert server.keys() == server.unfinished() == []


def test_throttling_and_broken_connections_only_take_time(server: S3Server) -> None:
    counts: dict[str, int] = {}

    def fault(request: Request) -> str:
        key = f"{request.method} {request.path} {request.query}"
        counts[key] = counts.get(key, 0) + 1
        kinds = ("", "", "throttle", "drop", "mute")
        return kinds[request.number % 5] if counts[key] == 1 else ""

    server.fault = fault
    job = Job.at(2, width=300_000)
    job.save(RUN)
    other = Job.at(0, width=300_000)
    other.load(RUN)
    assert other.bits() == job.bits()
    assert server.unfinished() == []


def test_damage_is_found_and_an_older_checkpoint_taken(server: S3Server) -> None:
    for step in (1, 2):
        Job.at(step).save(RUN)
    [name] = [e.name for e in storage.list(f"{RUN}/step2") if e.name.startswith("model")]
    data = bytearray(storage.get(f"{RUN}/step2/{name}", 1 << 20))
    data[4100] ^= 1
    storage.put(f"{RUN}/step2/{name}", bytes(data))
    with pytest.raises(CorruptShardError, match=f"{RUN}/step2/{name}: block 0"):
        Job.at(0).load(RUN, tag="step2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job = Job.at(0)
        assert job.load(RUN) == "step1"
    assert job.bits() == Job.at(1).bits()


def test_a_load_into_live_tensors_fetches_each_block_once(server: S3Server) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(1024, 8 << 10, bias=False)  # 32 MiB
    zero_ckpt.save_checkpoint(RUN, model, tag="tag")
    saved = model.weight.detach().clone()
    model.weight.data.zero_()
    server.requests.clear()
    zero_ckpt.load_checkpoint(RUN, model)
    assert torch.equal(model.weight, saved)
    assert 32 << 20 < server.sent() < 34 << 20


def test_a_partial_read_fetches_its_blocks_and_no_more(server: S3Server) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(1024, 8 << 10, bias=False)  # 32 MiB: eight blocks
    zero_ckpt.save_checkpoint(RUN, model, tag="tag")
    weights = zero_ckpt.get_fp32_state_dict_from_zero_checkpoint(RUN, lazy_mode=True)
    server.requests.clear()
    assert torch.equal(weights["weight"][5_000:5_001], model.weight[5_000:5_001].detach())
    assert server.sent() < 5 << 20


def test_every_command_takes_a_url(
    server: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        Job.at(step).save(RUN)
    for command in (
        ["ls", RUN],
        ["inspect", f"{RUN}/step1"],
        ["verify", RUN],
        ["verify", f"{RUN}/step2/"],
        ["export", RUN, str(tmp_path / "fp32")],
        ["convert", f"{RUN}/step1", f"{RUN}/converted"],
    ):
        assert main(command) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "committed, latest" in text
    assert f"{RUN}/step2/: ok, 3 files" in text
    assert contents(f"{RUN}/converted")["model/first.weight"] == contents(RUN, "step1").get(
        "model/first.weight"
    )
    assert (tmp_path / "fp32" / "model.safetensors").exists()
    assert main(["export", RUN, f"{RUN}/fp32"]) == 0
    assert f"{RUN}/fp32/model.safetensors" in capsys.readouterr().out
    assert main(["ls", f"{RUN}/nothing/there"]) == 2
    assert "no such checkpoint directory" in capsys.readouterr().err


def export_together(source: str, out: str) -> list[str]:
    control = control_for_process_group()
    return zero_ckpt.export_fp32(source, out, format="bin", max_shard_size="20MB", control=control)


def test_ranks_share_the_files_of_an_export_and_large_ones_go_up_in_parts(
    server: S3Server, tmp_path: Path
) -> None:
    model = torch.nn.ModuleList(torch.nn.Linear(2000, 2000) for _ in range(2))
    zero_ckpt.save_checkpoint(tmp_path / "source", model, step=1)
    found = run_ranks(export_together, WORLD, str(tmp_path / "source"), f"{RUN}/fp32")
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    names.append("pytorch_model.bin.index.json")
    assert found == [[f"{RUN}/fp32/{name}" for name in names]] * WORLD
    assert exported(f"{RUN}/fp32") == names
    assert sum(request.is_part for request in server.requests) >= 4
    zero_ckpt.export_fp32(
        tmp_path / "source", tmp_path / "out", format="bin", max_shard_size="20MB"
    )
    for name in names:
        data = storage.get(f"{RUN}/fp32/{name}", 1 << 30)
        assert data == (tmp_path / "out" / name).read_bytes()


def test_retention_and_removal_take_the_manifest_first(server: S3Server) -> None:
    for step in (1, 2, 3):
        Job.at(step, keep_last=2).save(RUN)
    assert [e.name for e in storage.list(RUN) if e.is_dir] == ["step2", "step3"]
    server.requests.clear()
    remove_tag(storage, RUN, "step2")
    deleted = [r for r in server.requests if r.method == "POST" and "delete" in r.query]
    assert len(deleted) == 2
    assert [e.name for e in storage.list(RUN)] == ["latest", "step3"]
    with pytest.raises(CheckpointNotFoundError, match="no such checkpoint"):
        Job.at(0).load(RUN, tag="step2")


# Frameworks


def train_with_lightning(directory: str, cwd: str) -> int:
    """One epoch, then two more from `last.ckpt`; the steps made. (Lightning itself finds "last" on disks only.)"""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.demos.boring_classes import BoringModel

    import zero_ckpt.lightning

    os.chdir(cwd)

    def trainer(epochs: int) -> Any:
        return pl.Trainer(
            strategy=zero_ckpt.lightning.ZeroStrategy(),
            accelerator="cpu",
            devices=WORLD,
            max_epochs=epochs,
            limit_train_batches=3,
            limit_val_batches=0,
            default_root_dir=directory,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[ModelCheckpoint(save_last=True)],
        )

    trainer(1).fit(BoringModel())
    resumed = trainer(3)
    resumed.fit(BoringModel(), ckpt_path=f"{directory}/checkpoints/last.ckpt")
    return int(resumed.global_step)


def test_lightning_trains_and_resumes_from_a_url(server: S3Server, tmp_path: Path) -> None:
    assert run_ranks(train_with_lightning, WORLD, RUN, str(tmp_path)) == [9, 9]
    tags = [entry.name for entry in storage.list(f"{RUN}/checkpoints") if entry.is_dir]
    assert tags == ["epoch=2-step=9.ckpt", "fp32", "last.ckpt"]
    assert exported(f"{RUN}/checkpoints/fp32") == ["model.safetensors"]
    assert contents(f"{RUN}/checkpoints/last.ckpt")["objects"]
    assert list(tmp_path.iterdir()) == []


def save_with_accelerate(directory: str, cwd: str) -> list[Any]:
    from accelerate import Accelerator

    import zero_ckpt.accelerate

    os.chdir(cwd)
    accelerator = Accelerator(cpu=True)
    zero_ckpt.accelerate.attach(accelerator)
    model = torch.nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    weight = accelerator.unwrap_model(model).weight
    before = weight.tolist()
    told = [accelerator.save_state(directory, client_state="kept")]
    with torch.no_grad():
        weight.zero_()
    told += [accelerator.load_state(directory), weight.tolist() == before]
    told.append(accelerator.load_state(f"{directory}/global_step1"))
    accelerator.end_training()
    return told


def test_accelerate_saves_to_and_loads_from_a_url(server: S3Server, tmp_path: Path) -> None:
    told = run_ranks(save_with_accelerate, WORLD, RUN, str(tmp_path))
    assert told == [[RUN, "kept", True, "kept"]] * WORLD
    assert exported(f"{RUN}/fp32") == ["model.safetensors"]
    assert list(tmp_path.iterdir()) == []


# Paths


def test_a_url_keeps_its_slashes_and_a_path_becomes_absolute(tmp_path: Path) -> None:
    assert absolute("s3://bucket/run/") == "s3://bucket/run"
    assert absolute("memory:///run//tag") == "memory://run/tag"
    assert absolute(f"file://{tmp_path}/x/../y") == str(tmp_path / "y")
    assert absolute("run") == str(Path.cwd() / "run")
    assert absolute(Path("~/run")) == str(Path.home() / "run"), "and no folder is called ~"


def test_a_url_that_was_made_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="s3:/bucket/run: a URL that was made a PosixPath"):
        zero_ckpt.load_checkpoint(Path("s3://bucket/run"), torch.nn.Linear(1, 1))
