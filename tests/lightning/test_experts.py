"""Experts on different ranks under the strategy: trained as one model, saved whole, resumed at other sizes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from tests.lightning.harness import on_ranks, trainer
from tests.zero import moe
from zero_ckpt import get_fp32_state_dict_from_zero_checkpoint

STEPS, CLIP = 3, 0.02


class Model(L.LightningModule):
    """Experts are built when the ranks are there, and declared. `parts` 0: all are here."""

    def __init__(self, seed: int, parts: int) -> None:
        super().__init__()
        self.seed, self.parts = seed, parts
        self.net: Any = None
        self.started: dict[str, torch.Tensor] = {}

    def configure_model(self) -> None:
        if self.net is None and self.parts:
            mesh = moe.expert_mesh(self.parts)
            self.net = moe.make_local(mesh, self.seed, declare=False)
            moe.declare_experts(self, self.net.expert_lists, mesh)
        elif self.net is None:
            self.net = moe.make_net(self.seed)

    def on_train_start(self) -> None:
        self.started = self.everything()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.net(batch) - batch.sum(-1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> Any:
        return moe.adam(self)

    def everything(self) -> dict[str, torch.Tensor]:
        run = moe.Trained(self.net, None, self.trainer.optimizers[0])
        return moe.everything(run, moe.expert_mesh(self.parts) if self.parts else None)


class Rows(Dataset[torch.Tensor]):
    """All ranks' rows of every step, as a DistributedSampler deals them out in turn."""

    def __init__(self) -> None:
        ranks = range(dist.get_world_size())
        steps = [torch.stack([moe.batch(s, rank) for rank in ranks], dim=1) for s in range(STEPS)]
        self.rows = torch.cat([step.flatten(0, 1) for step in steps])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


def fit(model: Model, root: Path, stage: int, steps: int, path: str | None = None) -> None:
    warnings.filterwarnings("ignore", ".*was saved by|.*is resumed by", UserWarning)
    data = DataLoader(Rows(), 8, sampler=DistributedSampler(Rows(), shuffle=False))
    saver = ModelCheckpoint(dirpath=root, filename="{step}", every_n_train_steps=STEPS)
    options: dict[str, Any] = {"gradient_clip_val": CLIP, "use_distributed_sampler": False}
    trainer(root, stage, max_steps=steps, callbacks=[saver], **options).fit(
        model, data, ckpt_path=path
    )


def _train(root: Path, stage: int, parts: int) -> None:
    model = Model(0, parts)
    fit(model, root, stage, STEPS)
    compare(model.everything(), dist.get_world_size())


def compare(found: dict[str, torch.Tensor], ranks: int) -> None:
    expected = moe.everything(moe.reference(STEPS, clip=CLIP, ranks=ranks), None)
    assert len(found) > 50
    for name in [name for name in found if not name.endswith("seen")]:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9, msg=name)


def _resume(root: Path, stage: int, parts: int, saved_by: int) -> None:
    model = Model(1, parts)
    fit(model, root / "again", stage, STEPS + 1, str(root / f"step={STEPS}.ckpt"))
    compare(model.started, saved_by)


@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (1, 4), (3, 4)])
def test_experts_train_as_one_model_and_resume_as_one(
    stage: int, world_size: int, tmp_path: Path
) -> None:
    on_ranks(_train, world_size, tmp_path, stage, 2)
    weights = get_fp32_state_dict_from_zero_checkpoint(tmp_path / f"step={STEPS}.ckpt")
    model = Model(2, 0)
    model.configure_model()
    model.load_state_dict(weights, strict=True)
    on_ranks(_resume, 1, tmp_path, 0, 0, world_size)


def test_a_run_of_one_process_resumes_with_experts_on_several(tmp_path: Path) -> None:
    on_ranks(_train, 1, tmp_path, 0, 0)
    on_ranks(_resume, 4, tmp_path, 2, 4, 1)
    on_ranks(_resume, 2, tmp_path, 1, 2, 1)
