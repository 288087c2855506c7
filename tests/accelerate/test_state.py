"""What a save keeps and a load gives back, beside weights: counters, registered objects, generators, the scaler."""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader, TensorDataset

from tests.accelerate.harness import (
    Net,
    assert_same,
    batches,
    make,
    on_ranks,
    state_of,
    train,
)
from tests.lightning.harness import whole
from zero_ckpt.accelerate import attach, data
from zero_ckpt.accelerate.base import prepared_model
from zero_ckpt.core.frameworks import unwrapped_optimizer
from zero_ckpt.errors import (
    CheckpointNotFoundError,
    FormatVersionError,
    StateMismatchError,
    UnsafeObjectError,
)


class Counter:
    def __init__(self, count: Any = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_output_dir_is_the_checkpoint_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for returned in on_ranks(save_twice, 2, str(out)):
        assert returned == out
    assert sorted(os.listdir(out)) == ["global_step2", "global_step4", "latest"]
    assert (out / "latest").read_text().strip() == "global_step4"


def save_twice(out: str) -> Path:
    made = make()
    for start in (0, 2):
        train(made, batches(2, start))
        path: Path = made[0].save_state(out)
    return path


def test_tags_and_client_state(tmp_path: Path) -> None:
    on_ranks(tags, 1, str(tmp_path))


def tags(out: str) -> None:
    made = make(keep_last=2)
    accelerator = made[0]
    for tag in ("a", "b", "c"):
        train(made, batches(1))
        accelerator.save_state(out, True, client_state={"tag": tag, "x": torch.ones(2)}, tag=tag)
    assert sorted(os.listdir(out)) == ["b", "c", "latest"]
    assert accelerator.load_state(out)["tag"] == "c"
    assert accelerator.load_state(out, tag="b")["tag"] == "b"
    assert accelerator._zero_step == 2
    assert accelerator.load_state(Path(out) / "c")["tag"] == "c"
    accelerator.save_state(output_dir=out, safe_serialization=False, save_latest=False, tag="d")
    assert (Path(out) / "latest").read_text().strip() == "c"
    with pytest.raises(CheckpointNotFoundError):
        accelerator.load_state(out, tag="a")


def test_counters_objects_and_generators_come_back(tmp_path: Path) -> None:
    for before, after in on_ranks(everything, 2, str(tmp_path)):
        assert_same(before, after)


def everything(out: str) -> tuple[Any, Any]:
    made = make(gradient_accumulation_steps=2)
    accelerator = made[0]
    objects = [Counter(), Counter()]
    accelerator.register_for_checkpointing(*objects)
    train(made, batches(4))
    objects[0].count, objects[1].count = 5, {"deep": [torch.arange(3), None, "text"]}
    random.seed(accelerator.process_index)
    np.random.seed(accelerator.process_index)
    torch.manual_seed(accelerator.process_index)
    accelerator.save_state(out)
    before = draws(), accelerator.step, [o.count for o in objects], accelerator._zero_step

    accelerator.step, objects[0].count, objects[1].count = 1, 0, 0
    train(made, batches(2))
    accelerator.load_state(out)
    return before, (draws(), accelerator.step, [o.count for o in objects], accelerator._zero_step)


def test_a_ranks_own_state_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    on_ranks(of_another_version, 2, str(tmp_path))


def of_another_version(out: str) -> None:
    made = make(2)
    accelerator = made[0]
    accelerator.prepare(DataLoader(TensorDataset(torch.ones(8, 6)), batch_size=2))
    train(made, batches(1))
    own = data.capture_loaders
    if accelerator.process_index == 1:
        data.capture_loaders = lambda _: {"version": 1, "loaders": [{"now": {}}]}
    accelerator.save_state(out)
    data.capture_loaders = own
    train(made, batches(1))
    before = state_of(made), accelerator._zero_step
    with pytest.raises(FormatVersionError) as raised:
        accelerator.load_state(out)
    assert "global_step1: what rank 1 stored for itself is not as" in str(raised.value)
    assert "dataloaders/loaders[0]/samples: missing. Nothing was loaded" in str(raised.value)
    assert_same(before, (state_of(made), accelerator._zero_step))
    accelerator.load_state(out, load_module_only=True)
    accelerator.save_state(out)
    accelerator.load_state(out)


def draws() -> list[Any]:
    return [random.random(), float(np.random.rand()), torch.rand(3)]


def test_another_number_of_registered_objects_is_accelerates_error(tmp_path: Path) -> None:
    on_ranks(other_objects, 2, str(tmp_path))


def other_objects(out: str) -> None:
    made = make()
    accelerator = made[0]
    accelerator.register_for_checkpointing(Counter(), Counter())
    train(made, batches(1))
    accelerator.save_state(out)
    accelerator._custom_objects.pop()
    train(made, batches(1))
    before = state_of(made)
    with pytest.raises(RuntimeError, match="does not match the number of registered objects"):
        accelerator.load_state(out)
    assert_same(before, state_of(made))
    accelerator.load_state(out, load_module_only=True)


def test_documented_failures_are_accelerates_own(tmp_path: Path) -> None:
    on_ranks(failures, 2, str(tmp_path))


def failures(out: str) -> None:
    accelerator = make()[0]
    with pytest.raises(ValueError, match=r"Tried to find .*nowhere but folder does not exist"):
        accelerator.load_state(out + "/nowhere")
    with pytest.raises(ValueError, match="No input_dir provided and automatic checkpoint naming"):
        accelerator.load_state()
    with pytest.raises(TypeError, match=r"expected str, bytes or os.PathLike object, not NoneType"):
        accelerator.save_state()
    accelerator.save_state(out)
    with pytest.raises(TypeError, match="Unsupported optimizer map location passed"):
        accelerator.load_state(out, map_location="invalid")
    for location in (None, "cpu", "on_device"):
        accelerator.load_state(out, map_location=location)
    with pytest.raises(TypeError, match="unexpected keyword arguments: stric"):
        accelerator.load_state(out, stric=True)


def test_pickled_objects_open_only_when_that_is_allowed(tmp_path: Path) -> None:
    on_ranks(pickled, 1, str(tmp_path))


def pickled(out: str) -> None:
    accelerator = make()[0]
    counter = Counter(Path("x").stat)  # nothing that has a place in the format
    accelerator.register_for_checkpointing(counter)
    counter.count = Counter(3)
    with pytest.warns(UserWarning, match="stored as pickles: 'accelerate/custom/0/count'"):
        accelerator.save_state(out)
    counter.count = None
    with pytest.raises(UnsafeObjectError, match="count"):
        accelerator.load_state(out)
    accelerator.load_state(out, load_kwargs={"weights_only": False})
    assert counter.count.count == 3


def test_the_gradient_scaler_comes_back(tmp_path: Path) -> None:
    on_ranks(scaler, 1, str(tmp_path))


def scaler(out: str) -> None:
    made = make()
    accelerator = made[0]
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    train(made, batches(1))
    accelerator.scaler.scale(torch.ones(1))
    accelerator.scaler.update(64.0)
    accelerator.save_state(out)
    accelerator.scaler.update(2.0)
    accelerator.load_state(out)
    assert accelerator.scaler.get_scale() == 64.0


@pytest.mark.parametrize("sync_each", [1, 3])
@pytest.mark.parametrize("kind", ["plain", 1, 2, 3, "fsdp2"])
def test_a_save_within_an_accumulation_window_loses_nothing(
    kind: Any, sync_each: int, tmp_path: Path
) -> None:
    for uninterrupted, resumed, saved_again in on_ranks(window, 2, str(tmp_path), kind, sync_each):
        assert_same(uninterrupted, resumed)
        assert_same(uninterrupted, saved_again)


def window(out: str, kind: Any, left: int) -> tuple[Any, Any, Any]:
    made = make(kind)
    accelerator = made[0]
    accelerator.gradient_accumulation_steps = 4
    train(made, batches(4 + left))
    accelerator.save_state(out)
    train(made, batches(4 - left, 4 + left))
    uninterrupted = state_of(made)
    accelerator.load_state(out)
    accelerator.save_state(f"{out}/again")
    train(made, batches(2))  # leaves gradients of its own
    accelerator.load_state(out)
    assert accelerator.step == 4 + left
    train(made, batches(4 - left, 4 + left))
    resumed = state_of(made)
    accelerator.load_state(f"{out}/again")
    train(made, batches(4 - left, 4 + left))
    return uninterrupted, resumed, state_of(made)


@pytest.mark.parametrize("kind", ["plain", 1, 2])
def test_buffers_that_are_not_shared_come_back_to_their_rank(kind: Any, tmp_path: Path) -> None:
    (first, *_), (second, *_) = results = on_ranks(own_buffers, 2, str(tmp_path), kind)
    assert not torch.equal(first["norm.running_mean"], second["norm.running_mean"])
    for saved, loaded in results:
        assert_same(saved, loaded)


def own_buffers(out: str, kind: Any) -> tuple[Any, Any]:
    apart = DistributedDataParallelKwargs(broadcast_buffers=False)
    made = make(kind, kwargs_handlers=[apart])
    train(made, batches(2))
    made[0].save_state(out)
    saved = buffers_of(made)
    train(made, batches(1))
    made[0].load_state(out)
    return saved, buffers_of(made)


def buffers_of(made: Any) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in prepared_model(made[1]).named_buffers()}


def test_a_window_begins_anew_at_another_world_size(tmp_path: Path) -> None:
    on_ranks(in_window, 2, str(tmp_path))
    (told,) = on_ranks(after_window, 1, str(tmp_path))
    assert any("the window begins anew" in text for text in told)
    assert any("AcceleratedScheduler makes 1 step for each" in text for text in told)


def in_window(out: str) -> None:
    made = make(gradient_accumulation_steps=4)
    train(made, batches(6))
    made[0].save_state(out)


def after_window(out: str) -> list[str]:
    made = make(gradient_accumulation_steps=4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made[0].load_state(out)
    assert made[0].step == 4
    assert all(p.grad is None for p in made[1].parameters())
    return [str(each.message) for each in told]


def test_zero_redundancy_optimizer_is_prepared_and_saved(tmp_path: Path) -> None:
    results = on_ranks(zero_redundancy, 2, str(tmp_path))
    for before, after, owned in results:
        assert_same(before, after)
        assert owned
    (whole,) = on_ranks(plainly, 1, str(tmp_path))
    assert_same(whole, results[0][0])


def zero_redundancy(out: str) -> tuple[Any, Any, int]:
    accelerator = attach(Accelerator(cpu=True))
    torch.manual_seed(0)
    model = Net()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = ZeroRedundancyOptimizer(trainable, torch.optim.AdamW, lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
    made = (accelerator, *accelerator.prepare(model, optimizer, scheduler))
    train(made, batches(2))
    accelerator.save_state(out)
    before = state_of(made)
    train(made, batches(2))
    accelerator.load_state(out)
    return before, state_of(made), len(made[2].optimizer.optim.state)


def plainly(out: str) -> Any:
    warnings.filterwarnings("ignore", ".*was saved by|AcceleratedScheduler makes", UserWarning)
    made = make()
    made[0].load_state(out)
    return state_of(made)


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3)])
def test_registered_objects_may_hold_sharded_tensors(
    sizes: tuple[int, int], tmp_path: Path
) -> None:
    before = on_ranks(averaging, sizes[0], str(tmp_path), False)
    after = on_ranks(averaging, sizes[1], str(tmp_path), True)
    assert_same(before[0], after[0])


class Average:
    """Holds an average of a model's weights, sharded as they are."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "decay": [0.9, (1, 2)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["decay"] == [0.9, (1, 2)]
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)


def averaging(out: str, load: bool) -> Any:
    warnings.filterwarnings("ignore", ".*was saved by|AcceleratedScheduler makes", UserWarning)
    made = make(3, seed=int(load))
    average = Average(made[1])
    made[0].register_for_checkpointing(average)
    if load:
        made[0].load_state(out)
    else:
        train(made, batches(1))
        made[0].save_state(out)
    return {name: whole(value).clone() for name, value in average.weights.items()}


@pytest.mark.parametrize("stage", [None, 1, 3])
def test_several_models_optimizers_and_schedulers(stage: int | None, tmp_path: Path) -> None:
    on_ranks(several, 2, str(tmp_path), stage)


def several(out: str, stage: int | None) -> None:
    accelerator = attach(Accelerator(cpu=True), stage)
    nets: list[nn.Module] = [nn.Linear(4, 4), nn.Linear(4, 1)]
    optimizers = [torch.optim.AdamW(net.parameters()) for net in nets]
    schedulers = [torch.optim.lr_scheduler.StepLR(o, n + 1, 0.5) for n, o in enumerate(optimizers)]
    prepared = accelerator.prepare(*optimizers, *nets, *schedulers)
    ready, models, rates = prepared[:2], prepared[2:4], prepared[4:]

    def steps(count: int) -> None:
        for _ in range(count):
            for which in (0, 1):
                accelerator.backward(models[which](torch.ones(2, 4)).pow(2).mean())
                ready[which].step()
                rates[which].step()
                ready[which].zero_grad()

    steps(2)
    accelerator.save_state(out)
    before = [{k: whole(v).clone() for k, v in net.state_dict().items()} for net in nets]
    last = [rate.get_last_lr() for rate in rates]
    steps(2)
    accelerator.load_state(out)
    assert_same(before, [{k: whole(v) for k, v in net.state_dict().items()} for net in nets])
    assert last == [rate.get_last_lr() for rate in rates]
    assert accelerator._zero_step == 2

    alone = attach(Accelerator(cpu=True))
    alone.prepare(nn.Linear(4, 4), torch.optim.AdamW(nn.Linear(4, 4).parameters()))
    with pytest.raises(StateMismatchError):
        alone.load_state(out)


def test_a_model_that_was_prepared_twice_is_stored_once(tmp_path: Path) -> None:
    on_ranks(twice, 2, str(tmp_path))


def twice(out: str) -> None:
    made = make()
    accelerator, model = made[0], made[1]
    accelerator.prepare(model)
    assert len(accelerator._models) == 2
    accelerator.save_state(out)
    fresh = make(seed=5)
    fresh[0].load_state(out)
    assert_same(state_of(made), state_of(fresh))


def test_optimizer_state_of_no_parameter_is_told(tmp_path: Path) -> None:
    on_ranks(with_global_state, 1, str(tmp_path))


def with_global_state(out: str) -> None:
    made = make()
    unwrapped_optimizer(made[2]).state["global"] = {"count": 3}
    with pytest.warns(UserWarning, match=r"keeps for no parameter \('global'\) is not saved"):
        made[0].save_state(out)
