"""One checkpoint directory, opened in turn through three doors: states stay bitwise equal."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from tests.accelerate.harness import assert_same, fsdp2, on_ranks
from tests.interop.cases import Case
from tests.interop.models import MODELS
from tests.interop.test_deepspeed_resume import optimizer_of
from tests.lightning.harness import Model, loader, trainer, whole
from tests.lightning.harness import loader as lightning_loader
from zero_ckpt import Checkpointer
from zero_ckpt.accelerate import attach
from zero_ckpt.core.frameworks import unwrapped_optimizer
from zero_ckpt.core.naming import parameter_names
from zero_ckpt.core.state import capture_model
from zero_ckpt.lightning import ZeroCheckpointIO

DIFFERENT = ".*was saved by|.*is resumed by|AcceleratedScheduler makes"


def state(model: nn.Module, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Whole weights (rank 0's buffers), optimizer state by name, options and scheduler. Collective."""
    captured = capture_model(model)
    weights = {
        k: whole(t).clone() for k, t in captured.tensors.items() if k not in captured.buffers
    }
    names = parameter_names(model)
    holder = getattr(optimizer, "optim", optimizer)
    own = {
        f"{names[id(p)]}/{k}": whole(v).clone()
        for p, values in holder.state.items()
        for k, v in values.items()
    }
    parts: list[Any] = [own]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
    states = {key: value for part in parts for key, value in part.items()}
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return {"weights": weights, "states": states, "options": options, "scheduler": scheduler}


class Watch(L.Callback):
    """What a fit begins and ends with."""

    def __init__(self) -> None:
        self.begin: dict[str, Any] = {}
        self.end: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin = lightning_state(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end = lightning_state(trainer)


def lightning_state(trainer: L.Trainer) -> dict[str, Any]:
    scheduler = trainer.lr_scheduler_configs[0].scheduler.state_dict()
    return state(trainer.lightning_module, trainer.optimizers[0], dict(scheduler))


def in_lightning(root: str, stage: int, resume: bool, tag: str) -> tuple[Any, Any]:
    warnings.filterwarnings("ignore", DIFFERENT, UserWarning)
    watch = Watch()
    fit = trainer(root, stage, max_steps=3, callbacks=[watch])
    module = Model()
    fit.fit(module, lightning_loader(), ckpt_path=f"{root}/ckpt" if resume else None)
    fit.save_checkpoint(f"{root}/ckpt/{tag}.ckpt")
    return watch.begin, watch.end


def in_accelerate(root: str, kind: int | str | None, steps: int = 3) -> tuple[Any, Any, int]:
    """The same module, a plain loop."""
    warnings.filterwarnings("ignore", DIFFERENT, UserWarning)
    if kind == "fsdp2":
        accelerator: Any = attach(fsdp2())
    else:
        accelerator = attach(Accelerator(cpu=True), kind if isinstance(kind, int) else None)
    module = Model()
    parts: Any = module.configure_optimizers()
    scheduler = parts["lr_scheduler"]["scheduler"]
    model, optimizer, data, scheduler = accelerator.prepare(
        module, parts["optimizer"], loader(), scheduler
    )
    accelerator.load_state(f"{root}/ckpt")
    count = accelerator._zero_step
    begin = accelerate_state(accelerator)
    for x, y in [batch for batch, _ in zip(data, range(steps), strict=False)]:
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.save_state(f"{root}/ckpt")
    return begin, accelerate_state(accelerator), count


def accelerate_state(accelerator: Any) -> dict[str, Any]:
    scheduler = accelerator._schedulers[0].state_dict()
    optimizer = unwrapped_optimizer(accelerator._optimizers[0])
    return state(accelerator._models[0], optimizer, dict(scheduler))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind", "last", "sizes"),
    [(3, 1, 2, (2, 2, 2)), (1, "fsdp2", 3, (2, 2, 2)), (2, None, 1, (2, 1, 2))],
)
def test_lightning_accelerate_lightning(
    stage: int, kind: Any, last: int, sizes: tuple[int, int, int], tmp_path: Path
) -> None:
    root = str(tmp_path)
    first = on_ranks(in_lightning, sizes[0], root, stage, False, "first")[0]
    second = on_ranks(in_accelerate, sizes[1], root, kind)[0]
    third = on_ranks(in_lightning, sizes[2], root, last, True, "third")[0]
    assert first[1]["states"]
    assert_same(first[1], second[0])
    assert second[2] == 3
    assert_same(second[1], third[0])
    back = on_ranks(in_accelerate, sizes[0], root, stage, 0)[0]
    assert_same(third[1], back[0])


def with_checkpointer(root: str, load: bool) -> Any:
    module = Model()
    parts: Any = module.configure_optimizers()
    optimizer, scheduler = parts["optimizer"], parts["lr_scheduler"]["scheduler"]
    with Checkpointer(module, optimizer, scheduler) as checkpointer:
        if load:
            checkpointer.load_checkpoint(f"{root}/ckpt")
            begin = state(module, optimizer, dict(scheduler.state_dict()))
            assert checkpointer.global_step == 5
            return begin
        for x, y in list(loader())[:2]:
            nn.functional.mse_loss(module(x), y).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        checkpointer.save_checkpoint(f"{root}/ckpt", client_state={"from": "checkpointer"})
        return state(module, optimizer, dict(scheduler.state_dict()))


@pytest.mark.parametrize("kind", [None, 3])
def test_checkpointer_accelerate_checkpointer(kind: Any, tmp_path: Path) -> None:
    (first,) = on_ranks(with_checkpointer, 1, str(tmp_path), False)
    second = on_ranks(in_accelerate, 2, str(tmp_path), kind)[0]
    assert_same(first, second[0])
    assert second[2] == 2
    warnings.filterwarnings("ignore", DIFFERENT, UserWarning)
    (third,) = on_ranks(quiet_checkpointer, 1, str(tmp_path))
    assert_same(second[1], third)


def quiet_checkpointer(root: str) -> Any:
    warnings.filterwarnings("ignore", DIFFERENT, UserWarning)
    return with_checkpointer(root, True)


def test_what_the_plugin_wrote_under_another_strategy_loads(tmp_path: Path) -> None:
    """Its optimizer state goes by numbers."""
    (first,) = on_ranks(by_plugin, 1, str(tmp_path))
    second = on_ranks(in_accelerate, 1, str(tmp_path), None, 0)[0]
    assert_same(first, second[0])


def by_plugin(root: str) -> Any:
    watch = Watch()
    plain = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=root,
        plugins=[ZeroCheckpointIO()],
        callbacks=[watch],
    )
    plain.fit(Model(), lightning_loader())
    plain.save_checkpoint(f"{root}/ckpt/plain.ckpt")
    return watch.end


def test_registered_objects_keep_their_state_when_another_door_wrote(tmp_path: Path) -> None:
    on_ranks(with_checkpointer, 1, str(tmp_path), False)
    on_ranks(registered, 1, str(tmp_path))


def registered(root: str) -> None:
    accelerator: Any = attach(Accelerator(cpu=True))
    module = Model()
    parts: Any = module.configure_optimizers()
    accelerator.prepare(module, parts["optimizer"], parts["lr_scheduler"]["scheduler"])
    extra = torch.optim.SGD([torch.zeros(1)], lr=0.25)
    accelerator.register_for_checkpointing(extra)
    with pytest.warns(UserWarning, match="was not written by an accelerator"):
        client_state = accelerator.load_state(f"{root}/ckpt")
    assert client_state == {"from": "checkpointer"}
    assert extra.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_that_deepspeed_began_goes_on(stage: int, deepspeed_cases: Path) -> None:
    for before, after, step in on_ranks(
        from_deepspeed, 2, deepspeed_cases / "base_z2_w2_fp32", stage
    ):
        assert before["states"]
        assert_same(before, after)
        assert step > 0


def from_deepspeed(folder: Path, stage: int) -> tuple[Any, Any, int]:
    """What `Checkpointer` makes of it, and what an accelerator does."""
    warnings.filterwarnings("ignore", DIFFERENT, UserWarning)
    case = Case(folder)
    plain = MODELS[case.meta["model"]]()
    its_own = optimizer_of(case, plain)
    with Checkpointer(plain, its_own) as checkpointer:
        checkpointer.load_checkpoint(case.directory, load_lr_scheduler_states=False)
    accelerator: Any = attach(Accelerator(cpu=True), stage)
    model = MODELS[case.meta["model"]]()
    optimizer = optimizer_of(case, model)
    accelerator.prepare(model, optimizer)
    accelerator.load_state(case.directory, load_lr_scheduler_states=False)
    after = state(accelerator._models[0], unwrapped_optimizer(accelerator._optimizers[0]), {})
    return state(plain, its_own, {}), after, accelerator._zero_step
