"""`end_training` leaves fp32 weights that load, once, in bounded time, and ends what Accelerate ends."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file

from tests.accelerate.harness import Net, assert_same, batches, impatient, make, on_ranks, train
from tests.lightning.harness import whole
from zero_ckpt.accelerate import attach
from zero_ckpt.accelerate.huggingface import save_configuration
from zero_ckpt.core.places import AnyStorage
from zero_ckpt.errors import ConfigurationError


def weights_of(made: Any) -> dict[str, torch.Tensor]:
    model = next(iter(made[0].zero_models().values()))
    return {key: whole(value).clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["plain", 1, 3, "fsdp2"])
def test_the_last_save_is_exported_beside_it(kind: Any, tmp_path: Path) -> None:
    saved = on_ranks(trained, 2, str(tmp_path), kind)[0]
    assert sorted(os.listdir(tmp_path)) == ["fp32", "global_step1", "global_step2", "latest"]
    assert os.listdir(tmp_path / "fp32") == ["model.safetensors"]
    exported = load_file(tmp_path / "fp32" / "model.safetensors")
    assert_same(saved, exported)
    Net().load_state_dict(exported, strict=True)


def trained(out: str, kind: Any) -> dict[str, torch.Tensor]:
    made = make(kind)
    for start in range(2):
        train(made, batches(1, start))
        made[0].save_state(out)
    saved = weights_of(made)
    train(made, batches(1))
    made[0].end_training()
    assert not dist.is_initialized()
    made[0].end_training()
    return saved


@pytest.mark.parametrize("given", ["auto", "path", "off"])
def test_what_is_exported_without_a_save(given: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    export = {"auto": "auto", "path": path, "off": False}[given]
    live = on_ranks(never_saved, 2, str(tmp_path), export)[0]
    assert os.listdir(tmp_path) == (["weights"] if given == "path" else [])
    if given == "path":
        assert os.listdir(path) == ["pytorch_model.bin"]
        assert_same(live, torch.load(path / "pytorch_model.bin"))


def never_saved(root: str, export: Any) -> dict[str, torch.Tensor]:
    made = make(2, export=export, export_format="bin")
    train(made, batches(2))
    live = weights_of(made)
    made[0].end_training()
    return live


def test_a_path_gets_the_last_save_in_several_files(tmp_path: Path) -> None:
    on_ranks(to_a_path, 2, str(tmp_path))
    names = sorted(os.listdir(tmp_path / "weights"))
    assert "model.safetensors.index.json" in names
    assert len(names) > 2
    assert sorted(os.listdir(tmp_path / "checkpoints" / "checkpoint_0")) == [
        "global_step1",
        "latest",
    ]


def to_a_path(root: str) -> None:
    config = ProjectConfiguration(project_dir=root, automatic_checkpoint_naming=True)
    made = make(export=f"{root}/weights", max_shard_size=400, project_config=config)
    train(made, batches(1))
    made[0].save_state()
    made[0].end_training()


def test_the_log_tells_where_the_weights_are(tmp_path: Path) -> None:
    told = on_ranks(export_told, 2, str(tmp_path))
    saved = f"{tmp_path}/saved"
    assert told == [[f"the weights of {saved}/global_step0 are in {saved}/fp32"], []]


def export_told(out: str) -> list[str]:
    told: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("zero_ckpt")
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    made = make()
    made[0].save_state(f"{out}/saved")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    made[0].end_training()
    return told


def test_an_export_that_fails_is_a_warning(tmp_path: Path) -> None:
    told = on_ranks(export_fails, 2, str(tmp_path))
    assert "the fp32 export failed" in told[0][0]
    assert told[1] == []


def export_fails(root: str) -> list[str]:
    Path(root, "file").write_text("in the way")
    made = make(export=f"{root}/file/folder")
    made[0].save_state(f"{root}/out")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made[0].end_training()
    assert not dist.is_initialized()
    return [str(each.message) for each in told if "export" in str(each.message)]


@pytest.mark.parametrize("given", ["auto", "path"])
def test_a_save_that_was_removed_is_not_exported(given: str, tmp_path: Path) -> None:
    export = {"auto": "auto", "path": str(tmp_path / "weights")}[given]
    told, other = on_ranks(removed, 2, str(tmp_path), export)
    assert other == []
    if given == "auto":
        assert len(told) == 1
        assert "global_step0 was removed after it was saved" in told[0]
        assert os.listdir(tmp_path) == []
    else:
        assert told == []
        Net().load_state_dict(load_file(tmp_path / "weights" / "model.safetensors"))


def removed(root: str, export: str) -> list[str]:
    made = make(2, export=export)
    made[0].save_state(f"{root}/out")
    if made[0].is_main_process:
        shutil.rmtree(f"{root}/out")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made[0].end_training()
    return [str(each.message) for each in told if "export" in str(each.message)]


def test_rank_0_exports_alone_when_the_others_have_left(tmp_path: Path) -> None:
    saved = on_ranks(left_alone, 2, str(tmp_path))[0]
    assert_same(saved, load_file(tmp_path / "fp32" / "model.safetensors"))


def left_alone(out: str) -> dict[str, torch.Tensor]:
    made = make()
    train(made, batches(1))
    made[0].save_state(out)
    weights = weights_of(made)
    impatient(made[0])
    if made[0].is_main_process:
        made[0].end_training()
    return weights


def test_without_a_process_group_the_main_process_exports(tmp_path: Path) -> None:
    on_ranks(group_is_gone, 2, str(tmp_path))
    assert os.path.isfile(tmp_path / "fp32" / "model.safetensors")


def group_is_gone(out: str) -> None:
    made = make()
    made[0].save_state(out)
    dist.destroy_process_group()
    made[0].end_training()


@pytest.mark.parametrize("kind", ["plain", 3])
def test_saves_and_loads_after_the_end_are_refused_and_touch_nothing(
    kind: Any, tmp_path: Path
) -> None:
    on_ranks(after_the_end, 2, str(tmp_path), kind)
    assert os.listdir(tmp_path / "checkpoints") == ["checkpoint_0"]


def after_the_end(root: str, kind: Any) -> None:
    config = ProjectConfiguration(root, automatic_checkpoint_naming=True, total_limit=1)
    made = make(kind, project_config=config)
    accelerator = made[0]
    train(made, batches(1))
    accelerator.save_state()
    accelerator.end_training()
    before = contents(root)
    with pytest.raises(ConfigurationError, match=r"2 processes.*Call save_state before that"):
        accelerator.save_state()
    with pytest.raises(ConfigurationError, match=r"2 processes.*Call load_state before that"):
        accelerator.load_state()
    assert contents(root) == before


def contents(root: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


def test_hooks_that_keep_the_weights_leave_nothing_to_export(tmp_path: Path) -> None:
    on_ranks(no_weights, 2, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["global_step0", "latest"]


def no_weights(out: str) -> None:
    made = make()
    made[0].register_save_state_pre_hook(lambda models, weights, path: weights.clear())
    made[0].save_state(out)
    made[0].end_training()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (3, "bf16")])
def test_a_hugging_face_model_opens_with_from_pretrained(
    stage: int, dtype: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    saved = on_ranks(hugging_face, 2, str(tmp_path), stage, dtype, timeout=100)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp32")
    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    expected = {name: value.to(model.dtype) for name, value in saved.items()}
    assert_same(expected, {k: v for k, v in model.state_dict().items() if k in saved})


def hugging_face(out: str, stage: int, dtype: str) -> dict[str, torch.Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    options = {"max_shard_size": "100KB", "export_dtype": dtype}
    accelerator: Any = attach(Accelerator(cpu=True), stage, **options)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=500, n_positions=16)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    tokens = torch.arange(8).view(1, 8)
    accelerator.backward(model(tokens, labels=tokens).loss)
    optimizer.step()
    accelerator.save_state(out)
    weights = weights_of([accelerator])
    accelerator.end_training()
    return weights


class Configuration:
    """As Hugging Face's: saves itself into a folder on a disk."""

    dtype: Any = None

    def save_pretrained(self, folder: str) -> None:
        Path(folder, "config.json").write_text(str(self.dtype))


@pytest.mark.parametrize(("name", "written"), [("fp32", True), ("weights.bin", False)])
def test_a_configuration_goes_beside_weights_in_an_object_store(name: str, written: bool) -> None:
    model = torch.nn.Linear(2, 2)
    model.config = Configuration()  # type: ignore[assignment]
    url = f"memory://configurations/{name}"
    assert save_configuration(model, url, "fp32") == written
    if written:
        assert AnyStorage().get(f"{url}/config.json", 100) == b"torch.float32"
    assert model.config.dtype is None
