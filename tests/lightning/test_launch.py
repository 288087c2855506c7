"""Finding the strategy by name, in both copies of Lightning, and starting its processes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import pytorch_lightning
import torch
from torch import nn

import zero_ckpt.lightning
from tests.lightning.harness import FEATURES, loader, on_ranks, trainer, whole_weights
from tests.programs import run_program
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.lightning import StandaloneZeroStrategy, ZeroStrategy
from zero_ckpt.lightning.registry import NAMES, register

STRATEGIES = {L: ZeroStrategy, pytorch_lightning: StandaloneZeroStrategy}


def test_names_give_strategies_in_both_copies_of_lightning() -> None:
    register()  # once more than the import did
    for copy, kind in STRATEGIES.items():
        for name, arguments in NAMES.items():
            run = copy.Trainer(accelerator="cpu", devices=1, strategy=name, logger=False)
            assert type(run.strategy) is kind
            for key, value in arguments.items():
                own = "_start_method" if key == "start_method" else key
                assert getattr(run.strategy, own) == value, (name, key)
    assert {"zero_ckpt", "zero_ckpt_stage_1", "zero_ckpt_stage_3_offload"} < set(NAMES)
    assert NAMES["zero_ckpt"] == {"stage": 2}


def test_strategy_is_pickled_by_its_public_name() -> None:
    for kind in STRATEGIES.values():
        strategy = pickle.loads(pickle.dumps(kind(stage=1)))
        assert type(strategy) is kind
        assert strategy.stage == 1
        assert getattr(zero_ckpt.lightning, kind.__name__) is kind


def test_wrong_settings_are_refused_at_once() -> None:
    with pytest.raises(ConfigurationError, match="stage=4"):
        ZeroStrategy(stage=4)
    with pytest.raises(ConfigurationError, match="stages 2 and 3"):
        ZeroStrategy(stage=1, cpu_offload=True)
    with pytest.raises(ConfigurationError, match="stages 2 and 3"):
        ZeroStrategy(stage=0, sharding_size=2)
    with pytest.raises(ConfigurationError, match="stage=True"):
        ZeroStrategy(stage=True)
    with pytest.raises(ConfigurationError, match=r"sharding_size=2\.0: expected a divisor"):
        ZeroStrategy(stage=2, sharding_size=2.0)
    with pytest.raises(ConfigurationError, match="save_timeout=0: expected a number of seconds"):
        ZeroStrategy(save_timeout=0)
    with pytest.raises(TypeError, match="stge"):
        ZeroStrategy(stge=3)
    with pytest.raises(AttributeError):
        zero_ckpt.lightning.Unknown  # noqa: B018


class Standalone(pytorch_lightning.LightningModule):
    """A module of the other copy, with the parameter names of a plain linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 3)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Native(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 3)

    training_step = Standalone.training_step
    configure_optimizers = Standalone.configure_optimizers
    test_step = Standalone.test_step


def _standalone(root: Path) -> Any:
    options = {
        "accelerator": "cpu",
        "devices": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(root),
    }
    run = pytorch_lightning.Trainer(strategy="zero_ckpt_stage_3", max_epochs=1, **options)
    model = Standalone()
    run.fit(model, loader())
    run.save_checkpoint(root / "a.ckpt")
    again = pytorch_lightning.Trainer(strategy="zero_ckpt_stage_1", max_epochs=2, **options)
    again.fit(Standalone(), loader(), ckpt_path=str(root / "a.ckpt"))
    native = Native()
    trainer(root, 2).test(native, loader(8), str(root / "a.ckpt"), verbose=False)
    return run.strategy.export, whole_weights(model), whole_weights(native), again.global_step


def test_the_standalone_package_trains_and_its_checkpoints_are_the_same(tmp_path: Path) -> None:
    for export, trained, loaded, step in on_ranks(_standalone, 2, tmp_path):
        assert export is True
        assert step == 12
        for key, value in trained.items():
            assert torch.equal(value, loaded[key])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_launchers_that_start_processes_hand_the_weights_back(tmp_path: Path, method: str) -> None:
    output = run_program("tests.lightning.launched", method, str(tmp_path))
    assert output.endswith("the weights are back\n")


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"async_save": "async"}, "async_save='async': expected True, False or an AsyncSave"),
        ({"wrap": "blocks"}, "wrap='blocks': expected 'auto', module classes"),
        ({"export": "out"}, r"export='out': expected True, False or an Fp32Export"),
    ],
)
def test_an_option_that_cannot_work_is_refused_before_the_fit(
    option: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigurationError, match=text):
        ZeroStrategy(**option)
