"""`load_module` does for a sharded checkpoint what `load_from_checkpoint` does for a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import pytorch_lightning
import torch
from torch import nn

from tests.lightning.harness import Model, assert_same, loader, on_ranks, trainer, whole_weights
from zero_ckpt.errors import CheckpointNotFoundError, ConfigurationError, UnsafeObjectError
from zero_ckpt.lightning import ZeroCheckpointIO, load_module


def train(root: Path, model: Model) -> dict[str, torch.Tensor]:
    run = trainer(root, 3, max_steps=2)
    run.fit(model, loader(16), loader(8))
    run.save_checkpoint(root / "checkpoints" / "step=2.ckpt")
    return whole_weights(model)


def train_default(root: Path) -> dict[str, torch.Tensor]:
    return train(root, Model(lr=0.03))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint directory that two ranks wrote at stage 3, and its weights."""
    root = tmp_path_factory.mktemp("trained")
    return root / "checkpoints", on_ranks(train_default, 2, root)[0]


@pytest.mark.parametrize("tag", [None, "step=2.ckpt"])
def test_weights_and_hyper_parameters_come_back_in_one_process(
    trained: tuple[Path, dict[str, torch.Tensor]], tag: str | None
) -> None:
    directory, weights = trained
    model = load_module(Model, directory, tag=tag)
    assert_same(whole_weights(model), weights)
    assert model.hparams["lr"] == 0.03
    assert_same(whole_weights(load_module(Model, directory / "step=2.ckpt")), weights)


def test_arguments_override_hyper_parameters(
    trained: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    assert load_module(Model, trained[0], lr=0.5).hparams["lr"] == 0.5


def test_the_device_is_the_one_that_was_asked_for(
    trained: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    assert load_module(Model, trained[0], map_location="meta").head.weight.is_meta
    assert load_module(Model, trained[0]).head.weight.device.type == "cpu"


class Larger(Model):
    def __init__(self, lr: float = 0.05, dropout: float = 0.0) -> None:
        super().__init__(lr, dropout)
        self.extra = nn.Linear(2, 2)


class Tolerant(Larger):
    strict_loading = False


def test_strictness_is_that_of_the_call_or_the_module(
    trained: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    directory, weights = trained
    with pytest.raises(RuntimeError, match=r"Missing key.*extra\.weight"):
        load_module(Larger, directory)
    with pytest.warns(UserWarning, match=r"not in the checkpoint.*extra\.weight"):
        loose = load_module(Larger, directory, strict=False)
    assert torch.equal(loose.head.weight, weights["head.weight"])


class Built(L.LightningModule):
    """Makes its layers late, and edits what is loaded."""

    def __init__(self, lr: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.head: nn.Module | None = None

    def configure_model(self) -> None:
        if self.head is None:
            self.head = nn.Linear(6, 3, bias=False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state_dict = checkpoint["state_dict"]
        checkpoint["state_dict"] = {"head.weight": state_dict["head.weight"] * 2}


def test_configure_model_and_the_load_hook_are_called(
    trained: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    directory, weights = trained
    assert torch.equal(load_module(Built, directory).head.weight, weights["head.weight"] * 2)  # type: ignore[union-attr, arg-type]


class Table(nn.Module):
    """Has a buffer that no checkpoint keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.arange(3.0), persistent=False)

    def reset_parameters(self) -> None:
        self.rows.copy_(torch.arange(3.0))


class OnMeta(Built):
    def configure_model(self) -> None:
        if self.head is None:
            with torch.device("meta"):
                self.head = nn.Linear(6, 3, bias=False)
                self.table = Table()


def test_what_is_made_on_the_meta_device_is_loaded(
    trained: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    directory, weights = trained
    model = load_module(OnMeta, directory)
    assert torch.equal(model.head.weight, weights["head.weight"] * 2)  # type: ignore[union-attr, arg-type]
    assert torch.equal(model.table.rows, torch.arange(3.0))
    assert "load_state_dict" not in vars(OnMeta)


def test_files_of_optimizer_state_are_not_read(tmp_path: Path) -> None:
    (weights,) = on_ranks(train_default, 1, tmp_path)
    tag = tmp_path / "checkpoints" / "step=2.ckpt"
    for shard in tag.glob("optim-*"):
        shard.write_bytes(bytes(shard.stat().st_size))
    assert_same(whole_weights(load_module(Model, tag)), weights)


def test_a_plain_file_of_lightnings_loads_too(tmp_path: Path) -> None:
    model = Model(lr=0.07)
    content = {
        "pytorch-lightning_version": L.__version__,
        "state_dict": model.state_dict(),
        "hyper_parameters": {"lr": 0.07},
    }
    torch.save(content, tmp_path / "x.ckpt")
    loaded = load_module(Model, tmp_path / "x.ckpt")
    assert loaded.hparams["lr"] == 0.07
    assert_same(whole_weights(loaded), whole_weights(model))


class Standalone(pytorch_lightning.LightningModule):
    def __init__(self, width: int, kind: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 2)


def save_by_io(directory: Path, module: Standalone, **hyper_parameters: Any) -> None:
    content = {
        "pytorch-lightning_version": L.__version__,
        "state_dict": module.state_dict(),
        "hparams_name": "kwargs",
        "hyper_parameters": hyper_parameters,
        "epoch": 0,
        "global_step": 0,
        "loops": {},
    }
    ZeroCheckpointIO().save_checkpoint(content, directory / "x.ckpt")


def test_modules_of_the_standalone_package_load(tmp_path: Path) -> None:
    module = Standalone(5)
    save_by_io(tmp_path, module, width=5)
    loaded = load_module(Standalone, tmp_path / "x.ckpt")  # type: ignore[type-var]
    assert_same(whole_weights(loaded), whole_weights(module))


def test_pickled_hyper_parameters_are_opened_only_when_that_is_allowed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="stored as pickles: 'client_state/hyper_parameters/kind'"):
        save_by_io(tmp_path, Standalone(5), width=5, kind=Path)
    with pytest.raises(UnsafeObjectError, match="hyper_parameters/kind"):
        load_module(Standalone, tmp_path / "x.ckpt")  # type: ignore[type-var]
    loaded = load_module(Standalone, tmp_path / "x.ckpt", weights_only=False)  # type: ignore[type-var]
    assert loaded.hparams["kind"] is Path


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no-such"):
        load_module(Model, tmp_path / "no-such")


def test_an_exported_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigurationError, match=r"Give the checkpoint's folder.*load_file"):
        load_module(Model, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match="is an export of weights alone"):
        ZeroCheckpointIO().load_checkpoint(tmp_path / "model.safetensors")


def test_what_is_no_class_of_modules_is_refused(tmp_path: Path) -> None:
    for given in (nn.Linear, Model()):
        with pytest.raises(ConfigurationError, match="expected a LightningModule class, found"):
            load_module(given, tmp_path)  # type: ignore[arg-type,type-var]
