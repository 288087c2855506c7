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
from zero_ckpt.zero import clip_grad_norm_

STEPS, CLIP = 3, 0.02


class Model(L.LightningModule):
    """Experts are built when the ranks are there, and declared."""

    def __init__(self, seed: int, parts: int) -> None:
        super().__init__()
        self.seed, self.parts = seed, parts
        self.net: Any = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.net is None and self.parts:
            self.net = moe.make_local(moe.expert_mesh(self.parts), self.seed, declare=False)
            moe.declare_experts(self, self.net.expert_lists, moe.expert_mesh(self.parts))
        elif self.net is None:
            self.net = moe.make_net(self.seed)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = (self.net(batch) - batch.sum(-1, keepdim=True)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return moe.adam(self)


class Rows(Dataset[torch.Tensor]):
    """All ranks' rows of every step, so that the ranks' parts together are the reference's batch."""

    def __init__(self, world_size: int) -> None:
        steps = [[moe.batch(s, rank) for rank in range(world_size)] for s in range(2 * STEPS)]
        # A DistributedSampler deals the rows out in turn.
        self.rows = torch.cat([torch.stack(ranks, dim=1).flatten(0, 1) for ranks in steps])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


def fit(model: Model, root: Path, stage: int, rows: int, steps: int, path: str | None) -> None:
    every, size = Rows(rows), 8 * rows // dist.get_world_size()
    data = DataLoader(every, size, sampler=DistributedSampler(every, shuffle=False))
    saver = ModelCheckpoint(dirpath=root, filename="{step}", every_n_train_steps=STEPS)
    options: dict[str, Any] = {"gradient_clip_val": CLIP, "use_distributed_sampler": False}
    run = trainer(root, stage, max_steps=steps, callbacks=[saver], **options)
    warnings.filterwarnings("ignore", ".*was saved by|.*is resumed by", UserWarning)
    run.fit(model, data, ckpt_path=path)


def _train(root: Path, stage: int) -> None:
    model = Model(seed=0, parts=2)
    fit(model, root, stage, dist.get_world_size(), STEPS, None)
    found = moe.everything(moe.Trained(model.net, None, model.trainer.optimizers[0]), mesh())
    expected = moe.everything(moe.reference(STEPS, clip=CLIP), None)
    for name in [name for name in found if not name.endswith("seen")]:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9, msg=name)


def mesh() -> Any:
    return moe.expert_mesh(2)


def _resume(root: Path, rows: int) -> None:
    """In one process, with all experts."""
    model = Model(seed=1, parts=0)
    fit(model, root / "again", 0, rows, 2 * STEPS, str(root / f"step={STEPS}.ckpt"))
    expected = moe.reference(2 * STEPS, clip=CLIP)
    torch.testing.assert_close(model.losses, expected.losses[STEPS:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (1, 4), (3, 4)])
def test_experts_train_as_one_model_and_resume_as_one(
    stage: int, world_size: int, tmp_path: Path
) -> None:
    on_ranks(_train, world_size, tmp_path, stage)
    weights = get_fp32_state_dict_from_zero_checkpoint(tmp_path / f"step={STEPS}.ckpt")
    model = Model(seed=2, parts=0)
    model.configure_model()
    model.load_state_dict(weights, strict=True)
    on_ranks(_resume, 1, tmp_path, world_size)


def _resume_in_parts(root: Path) -> list[float]:
    model = Model(seed=1, parts=dist.get_world_size())
    fit(model, root / "parts", 2, 2, 2 * STEPS, str(root / f"step={STEPS}.ckpt"))
    means = torch.tensor(model.losses, dtype=torch.double)
    dist.all_reduce(means)
    return (means / dist.get_world_size()).tolist()


def _train_whole(root: Path) -> list[float]:
    fit(Model(seed=0, parts=0), root, 0, 2, STEPS, None)
    return []


def test_a_run_of_one_process_resumes_with_experts_on_several(tmp_path: Path) -> None:
    on_ranks(_train_whole, 1, tmp_path)
    found = on_ranks(_resume_in_parts, 4, tmp_path)
    expected = on_ranks(_reference_losses, 1)[0]
    for losses in found:
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)


def _reference_losses() -> list[float]:
    run = moe.Trained(net := moe.make_net(), net, moe.adam(net))
    for step in range(2 * STEPS):
        rows = torch.cat([moe.batch(step, rank) for rank in range(2)])
        run.losses.append(moe.backward(net, rows, 1))
        clip_grad_norm_(net.parameters(), CLIP)
        run.optimizer.step()
        run.optimizer.zero_grad()
    return run.losses[STEPS:]
