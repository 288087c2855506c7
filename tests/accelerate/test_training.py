"""At our stages an Accelerate loop trains what DDP trains, with all that it may do on the way."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests.accelerate.harness import (
    Net,
    assert_same,
    batches,
    fsdp2,
    impatient,
    make,
    on_ranks,
    state_of,
    train,
)
from tests.lightning.harness import whole
from zero_ckpt.accelerate import attach
from zero_ckpt.accelerate.base import prepared_model
from zero_ckpt.errors import ConfigurationError, RankTimeoutError


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_train_what_ddp_trains(stage: int) -> None:
    for rank, (ddp, sharded) in enumerate(on_ranks(both, 2, stage)):
        torch.testing.assert_close(sharded[0], ddp[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sharded[1], ddp[1], rtol=1e-4, atol=1e-5)
        assert ("norm.running_mean" in ddp[1]["weights"]) is (rank == 0)


def both(stage: int) -> list[Any]:
    return [(clipped(made), state_of(made)) for made in (make(0), make(stage))]


def clipped(made: Any) -> list[Any]:
    """Accumulation, clipping by norm and by value: losses and norms."""
    accelerator, model, optimizer, scheduler = made
    accelerator.gradient_accumulation_steps = 2
    told = []
    for x in batches(6):
        with accelerator.accumulate(model):
            loss = (model(x) - 1).pow(2).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                told.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.7)))
                accelerator.clip_grad_value_(model.parameters(), 0.2)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            told.append(loss.item())
    model.eval()
    with torch.no_grad():
        told.append(float(model(batches(1)[0]).sum()))
    return told


@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_with_buffers_may_be_called_twice_before_a_backward_pass(stage: int) -> None:
    for ddp, sharded in on_ranks(called_twice, 2, stage):
        torch.testing.assert_close(sharded, ddp, rtol=1e-5, atol=1e-6)


def called_twice(stage: int) -> list[Any]:
    """Losses and the buffers on this rank, under DDP and at `stage`."""
    return [real_and_fake(make(kind)) for kind in (0, stage)]


def real_and_fake(made: Any) -> tuple[list[float], list[torch.Tensor]]:
    accelerator, model, optimizer, _ = made
    losses = []
    for real, fake in zip(batches(3), batches(3, start=3), strict=True):
        loss = (model(real) - 1).pow(2).mean() + model(fake).pow(2).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [buffer.clone() for buffer in prepared_model(model).buffers()]


def test_nothing_is_sent_within_an_accumulation_window() -> None:
    on_ranks(silent, 2)


def silent() -> None:
    made = make(3, gradient_accumulation_steps=2)
    train(made, batches(1))
    parameter = made[0]._models[0].blocks[0].lower.weight
    assert isinstance(parameter, DTensor)
    assert parameter.grad is None  # not reduced yet


def test_optimizers_and_schedulers_follow_in_any_order(tmp_path: Path) -> None:
    on_ranks(orders, 2)


def orders() -> None:
    for stage in (1, 3):
        expected = state_of_loop(stage, "together")
        for order in ("model first", "optimizer first", "reversed", "late scheduler"):
            assert_same(expected, state_of_loop(stage, order))


def state_of_loop(stage: int, order: str) -> Any:
    accelerator: Any = attach(Accelerator(cpu=True), stage)
    torch.manual_seed(0)
    model: Any = Net()
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    if order != "late scheduler":
        scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
    if order == "together":
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    elif order == "model first":
        model = accelerator.prepare(model)
        optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    elif order == "optimizer first":
        optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
        model = accelerator.prepare(model)
    elif order == "reversed":
        scheduler, optimizer, model = accelerator.prepare(
            scheduler, optimizer, model, device_placement=[True, True, True]
        )
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
        scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7))
    made = (accelerator, model, optimizer, scheduler)
    train(made, batches(3))
    return state_of(made)


def test_scaled_gradients_train_the_same() -> None:
    on_ranks(scaled, 2)


def scaled() -> None:
    results = []
    for scale in (None, 8.0):
        accelerator: Any = Accelerator(cpu=True)
        if scale is not None:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        attach(accelerator, 3)
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        made = (accelerator, *accelerator.prepare(model, optimizer, scheduler))
        train(made, batches(3))
        results.append(state_of(made)["weights"])
        assert accelerator._zero_step == 3
    torch.testing.assert_close(results[0], results[1])


def test_mixed_precision_keeps_fp32_weights(tmp_path: Path) -> None:
    on_ranks(mixed, 2, str(tmp_path))


def mixed(out: str) -> None:
    seen = []
    for stage in (0, 3):
        made = make(stage, mixed_precision="bf16")
        losses = train(made, batches(2))
        seen.append(losses)
        dtypes = {t.dtype for k, t in state_of(made)["weights"].items() if "num_batches" not in k}
        assert dtypes == {torch.float32}
        made[0].save_state(f"{out}/{stage}")
        made[0].load_state(f"{out}/{stage}")
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-3, atol=1e-3)


def test_save_model_writes_whole_weights(tmp_path: Path) -> None:
    weights = on_ranks(whole_model, 2, str(tmp_path))[0]
    saved = load_file(tmp_path / "model.safetensors")
    assert_same({key: weights[key] for key in saved}, saved)
    assert "head.weight" in saved or "tail.weight" in saved


def whole_model(out: str) -> Any:
    made = make(3)
    train(made, batches(1))
    made[0].save_model(made[1], out)
    return {key: whole(value).clone() for key, value in made[1].state_dict().items()}


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"state_dict_type": "FULL_STATE_DICT"}, "fsdp2"),
        ({"reshard_after_forward": False}, "fsdp2"),
    ],
)
def test_other_settings_of_accelerates_fsdp(options: Any, kind: str, tmp_path: Path) -> None:
    on_ranks(plugin, 2, str(tmp_path), options)


def plugin(out: str, options: Any) -> None:
    accelerator: Any = attach(fsdp2(options))
    model = Net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    made = (accelerator, *accelerator.prepare(model, optimizer, scheduler))
    train(made, batches(2))
    accelerator.save_state(out)
    before = state_of(made)
    train(made, batches(2))
    accelerator.load_state(out)
    assert_same(before, state_of(made))


@pytest.mark.slow
def test_hybrid_sharding_of_accelerates_fsdp(tmp_path: Path) -> None:
    before = on_ranks(hybrid, 4, str(tmp_path))[0]
    warnings.filterwarnings("ignore", ".*was saved by|AcceleratedScheduler makes", UserWarning)
    after = on_ranks(from_hybrid, 2, str(tmp_path))[0]
    assert_same(before, after)


def hybrid(out: str) -> Any:
    made = make("hsdp")
    train(made, batches(2))
    made[0].save_state(out)
    before = state_of(made)
    train(made, batches(1))
    made[0].load_state(out)
    assert_same(before, state_of(made))
    return before


def from_hybrid(out: str) -> Any:
    warnings.filterwarnings("ignore", ".*was saved by|AcceleratedScheduler makes", UserWarning)
    made = make(2)
    made[0].load_state(out)
    return state_of(made)


def test_a_model_that_its_user_has_sharded_is_saved(tmp_path: Path) -> None:
    on_ranks(users_own, 2, str(tmp_path))


def users_own(out: str) -> None:
    accelerator: Any = attach(Accelerator(cpu=True))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters()))
    accelerator.prepare_model(model, evaluation_mode=True)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    accelerator.save_state(out)
    before = whole(model[0].weight).clone()
    optimizer.step()
    accelerator.load_state(out)
    assert torch.equal(before, whole(model[0].weight))


@pytest.mark.slow
def test_tensor_parallel_models_are_saved(tmp_path: Path) -> None:
    on_ranks(tensor_parallel, 4, str(tmp_path))


def tensor_parallel(out: str) -> None:
    """With FSDP2 on the other dimension: parts that are no single rows."""
    accelerator: Any = attach(Accelerator(cpu=True))
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters()))
    accelerator.prepare_model(model, evaluation_mode=True)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    accelerator.save_state(out)
    before = {key: whole(value).clone() for key, value in model.state_dict().items()}
    optimizer.step()
    accelerator.load_state(out)
    assert_same(before, {key: whole(value) for key, value in model.state_dict().items()})


def test_frozen_parameters_may_be_left_out(tmp_path: Path) -> None:
    on_ranks(frozen, 2, str(tmp_path))


def frozen(out: str) -> None:
    made = make(3)
    made[0].save_state(out, exclude_frozen_parameters=True)
    other = make(1)
    other[0]._models[0].shift.data.fill_(4)
    other[0].load_state(out)
    assert other[0]._models[0].shift.tolist() == [4, 4, 4]


def test_a_save_that_one_rank_makes_alone_ends(tmp_path: Path) -> None:
    on_ranks(alone, 2, str(tmp_path))


def alone(out: str) -> None:
    made = make()
    if made[0].is_main_process:
        impatient(made[0])
        with pytest.raises(RankTimeoutError, match="rank 1"):
            made[0].save_state(out)
        impatient(made[0], None)
    dist.barrier()
    made[0].save_state(out)
    made[0].load_state(out)


def test_two_ways_of_sharding_optimizer_state_are_refused() -> None:
    on_ranks(twice_sharded, 2)


def twice_sharded() -> None:
    accelerator: Any = attach(Accelerator(cpu=True), 2)
    model = nn.Linear(2, 2)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW)
    with pytest.raises(ConfigurationError, match="ZeroRedundancyOptimizer is for stages 0 and 1"):
        accelerator.prepare(model, optimizer)


def test_one_process_trains_the_plain_model(tmp_path: Path) -> None:
    on_ranks(single, 1, str(tmp_path))


def single(out: str) -> None:
    made = make(3)
    assert type(prepared_model(made[1])) is Net
    train(made, batches(1))
    made[0].save_state(out)
    made[0].load_state(out)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_may_be_copied_after_it_is_prepared(stage: int) -> None:
    on_ranks(copied, 2, stage)


def copied(stage: int) -> None:
    """As for averaged weights: the copy has the same parts, and stays when the model is trained."""
    made = make(stage, mixed_precision="bf16")
    model = made[1]
    twin = copy.deepcopy(model)
    before = {name: whole(value).clone() for name, value in model.state_dict().items()}
    train(made, batches(2))
    kept = {name: whole(value) for name, value in twin.state_dict().items()}
    assert_same(kept, before)
    for own, other in zip(twin.parameters(), model.parameters(), strict=True):
        assert type(own) is type(other)
    assert not torch.equal(whole(model.head.weight), kept["head.weight"])
