"""What only several ranks have: generators of their own, sharded optimizer state, tensors that not all of them hold."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tests.core.jobs import assert_same, whole
from tests.told import told_once, warned
from tests.workers import run_ranks
from zero_ckpt import Checkpointer, load_checkpoint, save_checkpoint
from zero_ckpt.core import rng
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.core.lazy import LazyTensor
from zero_ckpt.errors import ConfigurationError, FormatVersionError, StateMismatchError


def draws() -> list[Any]:
    return [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()]


def _save_generators(directory: str) -> list[Any]:
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(dist.get_rank())
    save_checkpoint(directory, nn.Linear(1, 1), step=1)
    expected = draws()
    load_checkpoint(directory, nn.Linear(1, 1))
    assert draws() == expected
    return expected


def _derive_generators(directory: str) -> list[Any]:
    found = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_checkpoint(directory, nn.Linear(1, 1))
        told = [str(w.message) for w in caught if "random number generators" in str(w.message)]
        assert len(told) == (dist.get_rank() == 0)
        found.append(draws())
    assert found[0] == found[1]
    return found[0]


def test_every_rank_continues_its_own_random_numbers(tmp_path: Path) -> None:
    saved = run_ranks(_save_generators, 2, str(tmp_path))
    assert saved[0] != saved[1]
    derived = run_ranks(_derive_generators, 3, str(tmp_path))
    assert len({repr(found) for found in [*saved, *derived]}) == 5


def _generators_of_another_version(directory: str) -> None:
    capture = rng.capture
    if dist.get_rank() == 1:
        rng.capture = lambda *_: {"torch": torch.zeros(3, dtype=torch.uint8)}
    save_checkpoint(directory, nn.Linear(1, 1), step=1)
    rng.capture = capture
    net = nn.Linear(1, 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    text = r"global_step1: what rank 1 stored for itself.* rng: RuntimeError: .*rng=False\)"
    with pytest.raises(FormatVersionError, match=text):
        load_checkpoint(directory, net)
    assert_same(before, net.state_dict())
    assert Checkpointer(net, rng=False).load_checkpoint(directory)[0] is not None


def test_generators_that_cannot_be_set_are_refused_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    run_ranks(_generators_of_another_version, 2, str(tmp_path))


def _save_options(directory: str, apart: bool) -> list[str]:
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.param_groups[0]["d"] = 1.0 + dist.get_rank() * apart
    return warned(save_checkpoint, directory, net, optimizer, step=1)[1]


@pytest.mark.parametrize("apart", [False, True])
def test_options_that_differ_between_ranks_are_told_of(apart: bool, tmp_path: Path) -> None:
    told = told_once(run_ranks(_save_options, 2, str(tmp_path), apart))
    assert len(told) == apart
    assert all("options of the optimizers differ between ranks ('d')" in text for text in told)


class Nothing(torch.optim.SGD):
    """Keeps `None` where other optimizers keep a tensor, and a number beside it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p] |= {"buffer": None, "count": self.state[p].get("count", 0) + 1}


SHARDED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "nothing": lambda p: Nothing(p, 0.1),
    "rowwise": lambda p: RowWise(p),
}


class RowWise(torch.optim.Optimizer):
    """Factored state: one number for each row and each column of a gradient, in other dtypes."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                square = p.grad.square()
                if p.ndim == 2:
                    state["row"] = square.mean(1).double()
                    column = square.mean(0).half()
                    if isinstance(column, DTensor):
                        column = column.redistribute(placements=[Replicate()])
                    state["column"] = column
                else:
                    state["full"] = square.bfloat16()
                state["step"] = torch.tensor(float(len(state)))
                p.sub_(p.grad, alpha=group["lr"])


def small_net(seed: int, sharded: bool) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(3, 5), nn.Linear(5, 1)
    )  # 5 rows, and 1: uneven, and fewer than ranks
    return fully_shard(net) if sharded else net


def one_step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = {id(p): name for name, p in net.named_parameters()}
    found: dict[str, Any] = {name: whole(p) for name, p in net.named_parameters()}
    for p, state in optimizer.state.items():
        for name, value in state.items():
            tensor = isinstance(value, torch.Tensor)
            found[f"{names[id(p)]}/{name}"] = whole(value) if tensor else torch.tensor([value or 0])
    return found


def _save_sharded(directory: str) -> dict[str, Any]:
    found = {}
    for name, make in SHARDED.items():
        net = small_net(0, sharded=dist.get_world_size() > 1)
        optimizer = make(net.parameters())
        one_step(net, optimizer)
        save_checkpoint(directory, net, optimizer, tag=name, step=1)
        found[name] = state_of(net, optimizer)
    return found


def _load_sharded(directory: str, expected: dict[str, Any]) -> None:
    for name, make in SHARDED.items():
        net = small_net(1, sharded=dist.get_world_size() > 1)
        optimizer = make(net.parameters())
        with Checkpointer(net, optimizer, rng=False) as checkpointer:
            checkpointer.load_checkpoint(directory, name)
        assert_same(state_of(net, optimizer), expected[name])
        for p, state in optimizer.state.items():
            for key, value in state.items():
                sharded = isinstance(p, DTensor) and isinstance(value, torch.Tensor) and value.ndim
                assert isinstance(value, DTensor) == bool(sharded), key
        one_step(net, optimizer)


@pytest.mark.parametrize(("saved", "loaded"), [(2, 4), (4, 2), (1, 3), (3, 1)])
def test_sharded_optimizer_state_of_any_shape_goes_anywhere(
    saved: int, loaded: int, tmp_path: Path
) -> None:
    expected = run_ranks(_save_sharded, saved, str(tmp_path))[0]
    run_ranks(_load_sharded, loaded, str(tmp_path), expected)


class LookingBack(torch.optim.SGD):
    """Keeps a copy of a parameter in an attribute, which its state dict has beside torch's entries."""

    slow: torch.Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        first = self.param_groups[0]["params"][0]
        with torch.no_grad():
            self.slow = first.detach().clone() if self.slow is None else self.slow.lerp(first, 0.5)
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "slow": self.slow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.slow = state_dict.pop("slow")
        super().load_state_dict(state_dict)


def _own_state(directory: str) -> None:
    net, other = small_net(0, sharded=True), small_net(1, sharded=True)
    optimizer, again = LookingBack(net.parameters(), 0.1), LookingBack(other.parameters(), 0.1)
    one_step(net, optimizer)
    one_step(other, again)
    save_checkpoint(directory, net, optimizer, step=1)
    load_checkpoint(directory, other, again)
    one_step(net, optimizer)
    one_step(other, again)
    assert isinstance(optimizer.slow, DTensor)
    assert isinstance(again.slow, DTensor)
    assert again.slow.placements == optimizer.slow.placements
    assert torch.equal(again.slow.to_local(), optimizer.slow.to_local())


def test_sharded_tensors_that_an_optimizer_keeps_for_itself_come_back_sharded(
    tmp_path: Path,
) -> None:
    run_ranks(_own_state, 2, str(tmp_path))


class Logarithmic(nn.Module):
    """Has one weight, which its state dict has in another form: a sharded tensor, of which rank 1 has nothing."""

    def __init__(self, value: float) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        weight = distribute_tensor(torch.ones(1), mesh, [Shard(0)])
        self.weight, self.loads = nn.Parameter(torch.full_like(weight, value)), 0

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "log"] = self.weight.detach().log()

    def _load_from_state_dict(self, state: Any, prefix: str, *_: Any) -> None:
        self.loads += 1
        with torch.no_grad():
            self.weight.copy_(state[prefix + "log"].exp())


def _computed_and_sharded(directory: str) -> list[Any]:
    save_checkpoint(directory, Logarithmic(1.0), step=1)
    load_checkpoint(directory, other := Logarithmic(3.0))
    return [other.loads, other.weight.full_tensor().item()]


def test_all_ranks_give_a_module_what_it_computes_also_those_with_no_part(tmp_path: Path) -> None:
    assert run_ranks(_computed_and_sharded, 2, str(tmp_path)) == [[1, 1.0]] * 2


def _between_forward_and_backward(directory: str) -> None:
    """Stage 2 leaves whole parameters in the module after a forward, which are not those of the optimizer."""
    torch.manual_seed(0)
    net = fully_shard(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)), reshard_after_forward=False)
    optimizer = torch.optim.Adam(net.parameters())
    one_step(net, optimizer)
    with Checkpointer(net, optimizer) as checkpointer:
        net(torch.ones(2, 3))
        checkpointer.save_checkpoint(directory, "t")
        expected = state_of(net, optimizer)
        one_step(net, optimizer)
        net(torch.ones(2, 3))
        checkpointer.load_checkpoint(directory)
    assert_same(state_of(net, optimizer), expected)
    first = net(torch.ones(2, 3))
    plain = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    plain.load_state_dict({k: v for k, v in expected.items() if "/" not in k})
    torch.testing.assert_close(first, plain(torch.ones(2, 3)))
    assert "0.weight/exp_avg" in open_checkpoint(directory).keys("optim")


def test_a_save_and_a_load_may_follow_a_forward(tmp_path: Path) -> None:
    run_ranks(_between_forward_and_backward, 2, str(tmp_path))


def _save_client_dtensor(directory: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    average = distribute_tensor(torch.arange(10.0).reshape(5, 2), mesh, [Shard(0)])
    arriving = average.redistribute(
        placements=[Replicate()], async_op=True
    )  # its collective may still run
    state = {"ema": {"w": average, "again": average}, "n": 3, "whole": arriving}
    save_checkpoint(directory, nn.Linear(1, 1), step=1, client_state=state)


def _load_client_dtensor(directory: str) -> None:
    with Checkpointer(nn.Linear(1, 1), rng=False) as checkpointer:
        _, state = checkpointer.load_checkpoint(directory)
    assert state["n"] == 3
    assert isinstance(state["ema"]["w"], LazyTensor)
    assert torch.equal(state["ema"]["w"][1:3], torch.arange(10.0).reshape(5, 2)[1:3])
    for tensor in (state["ema"]["again"], state["whole"]):
        assert torch.equal(tensor + 0, torch.arange(10.0).reshape(5, 2))


def test_sharded_tensors_in_the_client_state_come_back_whole(tmp_path: Path) -> None:
    run_ranks(_save_client_dtensor, 3, str(tmp_path))
    run_ranks(_load_client_dtensor, 2, str(tmp_path))
    run_ranks(_load_client_dtensor, 1, str(tmp_path))


class Holder(nn.Module):
    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


def stage(number: int, filled: bool) -> Holder:
    shape = (3, number + 1)
    return Holder(w=torch.full(shape, float(number)) if filled else torch.zeros(shape))


def _save_stages(directory: str) -> None:
    rank = dist.get_rank()
    save_checkpoint(directory, {f"stage{rank}": stage(rank, True)}, step=1)


def _load_stages(directory: str, places: list[list[int]]) -> None:
    mine = places[dist.get_rank()]
    models = {f"stage{number}": stage(number, False) for number in mine}
    with Checkpointer(models, rng=False) as checkpointer:
        checkpointer.load_checkpoint(directory, load_module_strict=len(mine) == 3)
    for number in mine:
        assert models[f"stage{number}"].w.tolist() == [[number] * (number + 1)] * 3


def test_ranks_may_hold_different_tensors(tmp_path: Path) -> None:
    """As the stages of a pipeline do."""
    run_ranks(_save_stages, 3, str(tmp_path))
    run_ranks(_load_stages, 3, str(tmp_path), [[0], [1], [2]])
    run_ranks(_load_stages, 2, str(tmp_path), [[2, 0], [1]])
    run_ranks(_load_stages, 1, str(tmp_path), [[0, 1, 2]])


def _some_ranks_only(directory: str) -> None:
    """Two meshes of two ranks each hold one expert each; all ranks know of both."""
    experts = [torch.arange(6.0).reshape(3, 2) + 10 * n for n in range(2)]
    meshes = [DeviceMesh("cpu", [0, 2]), DeviceMesh("cpu", [1, 3])]

    def make(values: list[torch.Tensor]) -> Holder:
        pairs = zip(values, meshes, strict=True)
        return Holder(
            **{f"e{n}": distribute_tensor(v, m, [Shard(0)]) for n, (v, m) in enumerate(pairs)}
        )

    model = make(experts)
    save_checkpoint(directory, model, step=1)
    live = make([torch.zeros(3, 2)] * 2)
    load_checkpoint(directory, live)
    for name, p in live.named_parameters():
        saved = dict(model.named_parameters())[name]
        assert torch.equal(p.to_local(), saved.to_local())


def _load_experts_whole(directory: str) -> None:
    live = Holder(e0=torch.zeros(3, 2), e1=torch.zeros(3, 2))
    with Checkpointer(live, rng=False) as checkpointer:
        checkpointer.load_checkpoint(directory)
    assert live.e0.tolist() == torch.arange(6.0).reshape(3, 2).tolist()
    assert live.e1.tolist() == (torch.arange(6.0).reshape(3, 2) + 10).tolist()


def test_tensors_on_a_part_of_the_ranks(tmp_path: Path) -> None:
    run_ranks(_some_ranks_only, 4, str(tmp_path))
    run_ranks(_load_experts_whole, 2, str(tmp_path))


def _equal_bytes(directory: str) -> None:
    net = small_net(0, sharded=True)
    optimizer = torch.optim.Adam(net.parameters())
    one_step(net, optimizer)
    with Checkpointer(net, optimizer) as checkpointer:
        for place in ("one", "other"):
            checkpointer.save_checkpoint(f"{directory}/{place}", "t", {"words": {"a", "b"}})


def test_equal_state_gives_equal_files_on_every_rank(tmp_path: Path) -> None:
    run_ranks(_equal_bytes, 2, str(tmp_path))
    one, other = (
        {p.name: p.read_bytes() for p in (tmp_path / place / "t").glob("*.safetensors")}
        for place in ("one", "other")
    )
    assert len(one) == 6
    assert one == other


def _group_made_later(directory: str) -> None:
    """As when a script makes its objects before it joins the others."""
    rank, world_size, port = dist.get_rank(), dist.get_world_size(), int(os.environ["MASTER_PORT"])
    dist.destroy_process_group()
    net = small_net(0, sharded=False)
    with Checkpointer(net) as checkpointer:
        for attempt in range(2):
            store = dist.TCPStore("127.0.0.1", port, is_master=False)
            store = dist.PrefixStore(f"attempt {attempt}", store)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            checkpointer.save_checkpoint(directory, f"t{attempt}")
            assert open_checkpoint(directory, f"t{attempt}").manifest.world_size == 2
            if attempt == 0:
                dist.destroy_process_group()


def test_the_process_group_may_be_made_after_the_checkpointer(tmp_path: Path) -> None:
    run_ranks(_group_made_later, 2, str(tmp_path))


def _saved_alone(directory: str) -> list[str]:
    """What each kind of object says that outlives its process group."""
    plain, ddp = small_net(0, sharded=False), DistributedDataParallel(small_net(0, sharded=False))
    sharded = small_net(0, sharded=True)
    zero = ZeroRedundancyOptimizer(plain.parameters(), torch.optim.Adam, lr=0.1)
    known = Checkpointer(plain)
    save_checkpoint(directory, sharded, tag="whole")
    before = {key: t.to_local().clone() for key, t in sharded.state_dict().items()}
    load_checkpoint(directory, ddp, tag="whole")
    dist.barrier()
    dist.destroy_process_group()
    own = f"{directory}/{int(os.environ['RANK'])}"  # in one, a rank would also meet the others
    calls: list[Callable[[], object]] = [
        lambda: save_checkpoint(own, ddp, tag="t"),
        lambda: save_checkpoint(own, plain, zero, tag="t"),
        lambda: save_checkpoint(own, sharded, tag="t"),
        lambda: known.save_checkpoint(own, "t"),
        lambda: load_checkpoint(directory, sharded, tag="whole"),
    ]
    warnings.filterwarnings("ignore", "WORLD_SIZE is 2, but there is no process group")
    told = []
    for call in calls:
        with pytest.raises((ConfigurationError, StateMismatchError)) as caught:
            call()
        told.append(str(caught.value))
    assert_same({key: t.to_local() for key, t in sharded.state_dict().items()}, before)
    load_checkpoint(directory, ddp, tag="whole", load_optimizer_states=False)
    return told


def test_without_its_process_group_no_rank_takes_itself_for_the_only_one(tmp_path: Path) -> None:
    for told in run_ranks(_saved_alone, 2, str(tmp_path)):
        assert all("process group is gone" in text and "2 ranks" in text for text in told[:2])
        assert "the model belongs to 2 ranks" in told[0]
        assert "the optimizer belongs to 2 ranks" in told[1]
        assert "sharded over ranks up to 1, but 1 ranks save" in told[2]
        assert str(tmp_path) in told[3]
        assert "tensor '0.weight' is sharded over 2 ranks" in told[4]
    assert [path.name for path in tmp_path.rglob("manifest.json")] == ["manifest.json"]


class OfParts(torch.optim.Optimizer):
    """Keeps plain tensors of this rank's part, and of them nothing that says so."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        for p in self.param_groups[0]["params"]:
            self.state[p]["part"] = torch.full_like(p.to_local(), float(dist.get_rank()))


def _misplaced(directory: str) -> list[str]:
    net = fully_shard(nn.Linear(3, 4))
    turned = DeviceMesh("cpu", [1, 0])
    calls: list[Callable[[], object]] = [
        lambda: save_checkpoint(directory, net, OfParts(net.parameters()), tag="t"),
        lambda: save_checkpoint(
            directory, Holder(w=distribute_tensor(torch.arange(4.0), turned, [Shard(0)])), tag="t"
        ),
    ]
    told = []
    for call in calls:
        with pytest.raises(StateMismatchError) as caught:
            call()
        told.append(str(caught.value))
    whole = Holder(w=distribute_tensor(torch.arange(4.0), turned, [Replicate()]))
    save_checkpoint(directory, whole, tag="same")
    return told


def test_parts_of_which_nothing_tells_the_place_are_refused(tmp_path: Path) -> None:
    found = run_ranks(_misplaced, 2, str(tmp_path))
    assert found[0] == found[1]
    assert "'part' of 'weight' as a plain tensor of shape [2, 3]" in found[0][0]
    assert "tensor 'w' is sharded over a mesh of ranks [1, 0], which its process" in found[0][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "same"]


def _large_replicated(directory: str) -> dict[str, int]:
    torch.manual_seed(0)
    odd = torch.randn(1031, 1009)
    model = Holder(odd=odd, turned=torch.randn(700, 1500).t(), line=torch.randn(1_500_001))
    save_checkpoint(directory, model, step=1)
    live = Holder(odd=odd * 0, turned=torch.zeros(1500, 700), line=torch.zeros(1_500_001))
    load_checkpoint(directory, live)
    assert_same(dict(live.state_dict()), dict(model.state_dict()))
    folder = Path(directory) / "global_step1"
    return {p.name: p.stat().st_size for p in folder.glob("model-*")}


@pytest.mark.parametrize("world_size", [2, 3])
def test_replicas_share_the_writing_of_large_tensors(world_size: int, tmp_path: Path) -> None:
    sizes = run_ranks(_large_replicated, world_size, str(tmp_path))[0].values()
    assert len(sizes) == world_size
    assert max(sizes) < 1.02 * min(sizes)


def _different_shapes(directory: str) -> str:
    with pytest.raises(StateMismatchError) as caught:
        save_checkpoint(directory, Holder(w=torch.ones(2 + dist.get_rank())), step=1)
    return str(caught.value)


def test_one_name_for_different_tensors_is_refused_on_every_rank(tmp_path: Path) -> None:
    found = run_ranks(_different_shapes, 2, str(tmp_path))
    assert found[0] == found[1]
    assert "tensor 'w' is F32 [2] on one rank and F32 [3] on another" in found[0]
    assert list(tmp_path.iterdir()) == []


def _without_a_group(directory: str) -> list[str]:
    """As when a script that torchrun has started forgets to join its processes."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    net = nn.Linear(2, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_checkpoint(f"{directory}/{rank}", net, tag="t")
        load_checkpoint(f"{directory}/{rank}", net)
    assert {warning.filename for warning in caught} <= {__file__}
    return [str(warning.message) for warning in caught]


def test_processes_that_no_group_joins_are_told_so_once(tmp_path: Path) -> None:
    first, second = run_ranks(_without_a_group, 2, str(tmp_path))
    assert len(first) == 2  # by the save and by the load
    for text in first:
        assert text.startswith("WORLD_SIZE is 2, but there is no process group"), text
        assert "Call torch.distributed.init_process_group() first." in text
    assert second == []
