"""What `shard_module` does to a module, whatever that is made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.workers import run_ranks
from tests.zero.training import (
    WIDTH,
    Block,
    Collectives,
    Fails,
    Net,
    adam,
    assert_equal,
    backward,
    batch,
    make_net,
    train,
    whole,
    whole_weights,
)
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero import (
    make_mesh,
    mixed_precision_policy,
    reshard,
    set_gradient_sync,
    shard_module,
)
from zero_ckpt.zero.sync import average_gradients_of


def shard(module: nn.Module, stage: int = 3, **options: Any) -> Any:
    mesh = make_mesh(dist.get_world_size(), options.pop("sharding_size", None), "cpu")
    return shard_module(module, stage=stage, mesh=mesh, **options)


def _sharding_is_described() -> None:
    net = make_net()
    sharding = shard(net)
    assert sharding.units == ("blocks.0", "blocks.1", "blocks.2", "")
    assert set(sharding.replicated) == {"scale", "empty"}
    for name, parameter in net.named_parameters():
        assert isinstance(parameter, DTensor) != (name in sharding.replicated)
    assert net.head.weight is net.embed.weight
    assert shard(net) is sharding


def test_sharding_is_described_and_happens_once() -> None:
    run_ranks(_sharding_is_described, 2)


def _replicated_root_is_described() -> None:
    net = make_net()
    sharding = shard(net, root="replicate")
    assert sharding.units == ("blocks.0", "blocks.1", "blocks.2")
    assert set(sharding.replicated) == {"embed.weight", "shift", "scale", "empty"}
    assert not isinstance(net, FSDPModule)
    with pytest.raises(ConfigurationError, match="already sharded with stage=3, root='replicate'"):
        shard(net, stage=2)
    sharded = make_net()
    shard(sharded)
    with pytest.raises(ConfigurationError, match=r"^Net is already sharded with stage=3"):
        shard(sharded, stage=2)


def test_with_a_replicated_root_only_units_are_sharded() -> None:
    run_ranks(_replicated_root_is_described, 2)


def _ranks_start_equal(root: str, sharding_size: int | None) -> dict[str, torch.Tensor]:
    net = make_net(seed=dist.get_rank())
    net.steps += dist.get_rank()
    shard(net, root=root, sharding_size=sharding_size)
    return whole_weights(net)


@pytest.mark.parametrize("root", ["shard", "replicate"])
@pytest.mark.parametrize(("world_size", "sharding_size"), [(2, None), (4, 2)])
def test_all_ranks_start_from_rank_0(root: str, world_size: int, sharding_size: int | None) -> None:
    expected = dict(make_net(seed=0).state_dict())
    for weights in run_ranks(_ranks_start_equal, world_size, root, sharding_size):
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)


# --- meta device ----------------------------------------------------------------------------------


class Resettable(Net):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.shift, 0.1)
        nn.init.constant_(self.scale, 1.5)
        self.steps.fill_(7)


def _meta_is_materialized(root: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(dist.get_rank())
    with torch.device("meta"):
        net = Resettable()
    shard(net, root=root)
    assert net.head.weight is net.embed.weight
    backward(net, 0, 1)
    return whole_weights(net)


@pytest.mark.parametrize("root", ["shard", "replicate"])
def test_meta_modules_get_equal_values_on_all_ranks(root: str) -> None:
    first, second = run_ranks(_meta_is_materialized, 2, root)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first["steps"] == 7
    assert first["scale"] == 1.5
    assert 0.5 < first["embed.weight"].std() < 1.5  # nn.Embedding's own initialization


def _own_units_are_materialized(sharding_size: int | None, root: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(dist.get_rank())
    with torch.device("meta"):
        net = Resettable()
    net.scale = nn.Parameter(torch.empty(1, device="meta"))
    net.empty = nn.Parameter(torch.zeros(1))  # fully_shard takes no scalar, and trains no empty one
    mesh = make_mesh(dist.get_world_size(), sharding_size, "cpu")
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    if root:
        fully_shard(net, mesh=mesh)
    shard_module(net, stage=3, mesh=mesh)
    assert net.head.weight is net.embed.weight
    backward(net, 0, 1)
    assert not any(p.is_meta for p in net.parameters())
    return whole_weights(net)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize(("world_size", "sharding_size"), [(1, None), (2, None), (4, 2)])
def test_meta_modules_that_are_sharded_already_get_the_same_values_on_any_ranks(
    world_size: int, sharding_size: int | None, root: bool
) -> None:
    expected = run_ranks(_own_units_are_materialized, 1, None, root)[0]
    for weights in run_ranks(_own_units_are_materialized, world_size, sharding_size, root):
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    first, second = (expected[f"blocks.{i}.mlp.0.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


class HuggingFaceStyle(Resettable):
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.constant_(module.weight, 0.25)


def _init_weights_is_used() -> None:
    with torch.device("meta"):
        net = HuggingFaceStyle()
    shard(net)
    assert torch.all(whole(net.embed.weight) == 0.25)


def test_meta_modules_are_initialized_by_the_models_own_convention() -> None:
    run_ranks(_init_weights_is_used, 1)


class Incomplete(Net):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.shift, 0.1)


def _meta_is_refused(build: Callable[[], nn.Module], message: str) -> None:
    with torch.device("meta"):
        net = build()
    with pytest.raises(ConfigurationError, match=message):
        shard(net)


def test_meta_modules_that_cannot_be_initialized_are_named() -> None:
    run_ranks(_meta_is_refused, 1, Net, r"without a way to be initialized: \(root\) \(Net\)")


def test_meta_modules_left_without_a_value_are_named() -> None:
    run_ranks(_meta_is_refused, 1, Incomplete, r"without a value, in one of: .*\(Incomplete\)")


# --- refusals -------------------------------------------------------------------------------------


def _is_refused(build: Callable[[], nn.Module], stage: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        shard(build(), stage=stage)


def in_ddp() -> nn.Module:
    return nn.Sequential(DistributedDataParallel(make_net()))


def sparse() -> nn.Module:
    return nn.Sequential(nn.Embedding(4, 2, sparse=True))


def bounded() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(4, 2, max_norm=1.0))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


@pytest.mark.parametrize(
    ("build", "stage", "message"),
    [
        (make_net, 1, "for stages 2 and 3, not 1"),
        (in_ddp, 3, "0 is already wrapped in DistributedDataParallel"),
        (sparse, 2, "0 is an Embedding with sparse=True, .* Use stage 0 or 1"),
        (bounded, 3, "0 is an EmbeddingBag with max_norm=1.0"),
        (lazy, 3, "lazy modules have no shape yet: 0.weight, 0.bias"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    build: Callable[[], nn.Module], stage: int, message: str
) -> None:
    run_ranks(_is_refused, 1, build, stage, message)


# --- kinds of modules -----------------------------------------------------------------------------


def _own_units_are_kept() -> None:
    net = make_net()
    mesh = make_mesh(dist.get_world_size(), None, "cpu")
    fully_shard(net.blocks[1], mesh=mesh)
    sharding = shard_module(net, stage=3, mesh=mesh)
    assert sharding.units == ("",)
    units = [name for name, module in net.named_modules() if isinstance(module, FSDPModule)]
    assert units == ["", "blocks.1"]
    backward(net, 0, 1)


def test_units_that_the_model_has_already_are_kept() -> None:
    run_ranks(_own_units_are_kept, 2)


class MixedDtypes(Net):
    """One trainable parameter of another dtype, in a unit and in the root; integers; a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.double()
        self.gain = nn.Parameter(torch.ones(3))
        self.blocks[0].gain = nn.Parameter(torch.ones(2))
        self.codes = nn.Parameter(torch.arange(4), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        gain = self.gain.double().prod() * self.blocks[0].gain.double().sum()
        return super().forward(tokens) * gain * self.codes.sum()


def mixed_dtypes() -> nn.Module:
    torch.manual_seed(0)
    return MixedDtypes()


def _mixed_dtypes_train() -> None:
    sharding = shard(mixed_dtypes())
    assert {"gain", "blocks.0.gain", "codes"} < set(sharding.replicated)
    # The float32 parameters round like float32.
    assert_equal(train(3, build=mixed_dtypes), train(0, build=mixed_dtypes), tolerance=1e-6)


def test_parameters_of_another_dtype_stay_whole_and_train() -> None:
    run_ranks(_mixed_dtypes_train, 2)


class Recurrent(Net):
    """nn.LSTM keeps its weights in a list of its own; a permuted weight is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(nn.LSTM(6, 6, batch_first=True))
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = nn.Parameter(torch.randn(6, 13).T)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.shift
        x, _ = self.blocks[3](x)
        for block in self.blocks[:3]:
            x = block(x)
        return self.head(x) * self.scale + self.empty.sum()


def recurrent() -> nn.Module:
    torch.manual_seed(0)
    return Recurrent().double()


def _recurrent_trains(wrap: Any) -> None:
    assert_equal(train(3, build=recurrent, wrap=wrap), train(0, build=recurrent))


@pytest.mark.parametrize("wrap", ["auto", {nn.LSTM, Block}])
def test_recurrent_and_non_contiguous_weights_train(wrap: Any) -> None:
    run_ranks(_recurrent_trains, 2, wrap)


class Shared(Net):
    """A module used twice, a weight shared by two blocks, and one shared with the root."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(self.blocks[0])
        self.blocks[2].mlp[0].weight = self.blocks[1].mlp[0].weight


def shared() -> nn.Module:
    torch.manual_seed(0)
    return Shared().double()


def _shared_trains(root: str) -> None:
    sharding = shard(shared(), root=root)
    assert [unit for unit in sharding.units if unit] == ["blocks.0"]
    assert_equal(train(3, build=shared, root=root), train(0, build=shared))


@pytest.mark.parametrize("root", ["shard", "replicate"])
def test_shared_modules_and_weights_train(root: str) -> None:
    run_ranks(_shared_trains, 2, root)


# --- parameters without gradients -----------------------------------------------------------------


class PartlyUnused(Net):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[1](self.embed(tokens)))


def _unused_do_not_hang(stage: int, root: str) -> None:
    net = PartlyUnused()
    shard(net, stage=stage, root=root)
    before = whole_weights(net)
    optimizer = adam(net)
    for step in range(3):
        backward(net, step, 1)
        optimizer.step()
        optimizer.zero_grad()
    after = whole_weights(net)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"embed", "head", "blocks"}
    assert not [name for name in changed if name.startswith(("blocks.0", "blocks.2"))]


@pytest.mark.parametrize("root", ["shard", "replicate"])
@pytest.mark.parametrize("stage", [2, 3])
def test_unused_parameters_keep_their_value_and_do_not_hang(stage: int, root: str) -> None:
    run_ranks(_unused_do_not_hang, 2, stage, root)


def _unfrozen_later(root: str) -> None:
    net = make_net()
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    shard(net, root=root)
    backward(net, 0, 1)
    net.zero_grad()
    reference = DistributedDataParallel(make_net())
    net.requires_grad_(True)
    backward(net, 0, 1)
    backward(reference, 0, 1)
    for (name, mine), theirs in zip(
        net.named_parameters(), reference.module.parameters(), strict=True
    ):
        assert mine.grad is not None, name
        torch.testing.assert_close(whole(mine.grad), theirs.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("root", ["shard", "replicate"])
def test_parameters_unfrozen_later_get_averaged_gradients(root: str) -> None:
    run_ranks(_unfrozen_later, 2, root)


def _averaged_after_a_failure() -> None:
    net = nn.Module()
    net.inner, net.scale = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0))
    average_gradients_of(net, [net.scale, net.inner], make_mesh(dist.get_world_size(), None, "cpu"))

    def train_once() -> None:
        """The gradient of `scale` is there before that of `inner`."""
        net.zero_grad()
        (Fails.apply(net.inner * (1.0 + dist.get_rank())) * net.scale).backward()

    Fails.armed = True
    with pytest.raises(ArithmeticError, match="in the middle"):
        train_once()
    Fails.armed = False
    assert net.scale.grad is not None
    train_once()
    assert [net.scale.grad.item(), net.inner.grad.item()] == [2.0 * 1.5, 3.0 * 1.5]


def test_gradients_are_averaged_after_a_backward_pass_that_failed() -> None:
    run_ranks(_averaged_after_a_failure, 2)


# --- communication, and gathered parameters -------------------------------------------------------


def _collectives_of(net: nn.Module, enabled: bool) -> set[str]:
    set_gradient_sync(net, enabled)
    with Collectives() as collectives:
        backward(net, 0, 1)
    return set(collectives.names)


def _accumulation_sends_nothing_needless(stage: int, root: str) -> None:
    net = make_net()
    shard(net, stage=stage, root=root)
    _collectives_of(net, enabled=False)
    gathers = {"_allgather_base_"}
    whole_meanwhile = stage == 2 and root == "shard"
    assert _collectives_of(net, enabled=False) == (set() if whole_meanwhile else gathers)
    reduces = {"_reduce_scatter_base_", "allreduce_"}
    assert _collectives_of(net, enabled=True) - gathers == reduces


@pytest.mark.parametrize("root", ["shard", "replicate"])
@pytest.mark.parametrize("stage", [2, 3])
def test_accumulation_sends_nothing_needless(stage: int, root: str) -> None:
    run_ranks(_accumulation_sends_nothing_needless, 2, stage, root)


def _all_sharded(net: nn.Module) -> bool:
    return all(isinstance(p, DTensor) or not p.ndim or not p.numel() for p in net.parameters())


def _nothing_stale(stage: int) -> None:
    net = make_net()
    shard(net, stage=stage)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            net(batch(0))
        assert _all_sharded(net)
    backward(net, 0, 1)
    before = net(batch(0)).detach()  # with gradients, and no backward pass follows
    assert not _all_sharded(net)
    optimizer.step()
    assert _all_sharded(net)
    with torch.no_grad():
        after = net(batch(0))
        expected = _copy_of(net)(batch(0))
    torch.testing.assert_close(after, expected)
    assert not torch.equal(before, after)
    net(batch(0))
    reshard(net)
    assert _all_sharded(net)


class Reentrant(Net):
    """Calls itself and then uses its own layers, as `training_step` of a LightningModule does."""

    def forward(self, tokens: torch.Tensor, hidden: bool = False) -> torch.Tensor:
        if not hidden:
            return self.head(self(tokens, hidden=True)) * self.scale + self.empty.sum()
        x = self.embed(tokens) + self.shift
        for block in self.blocks:
            x = block(x)
        return x


def reentrant() -> nn.Module:
    torch.manual_seed(0)
    return Reentrant().double()


def _reentrant_trains(stage: int) -> None:
    net = reentrant()
    shard(net, stage=stage)
    assert net.blocks[0](torch.zeros(1, WIDTH).double()).shape == (1, WIDTH)  # before the root
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            net(batch(0))
    assert_equal(train(stage, build=reentrant), train(0, build=reentrant))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_root_may_call_itself_and_its_parts(stage: int) -> None:
    run_ranks(_reentrant_trains, 2, stage)


def _copy_of(net: nn.Module) -> nn.Module:
    copy = make_net()
    copy.load_state_dict(whole_weights(net))
    return copy


@pytest.mark.parametrize("stage", [2, 3])
def test_no_forward_pass_runs_on_stale_parameters(stage: int) -> None:
    run_ranks(_nothing_stale, 2, stage)


def _autocast_equals_stage_0(stage: int, root: str) -> None:
    net, reference = make_net().float(), DistributedDataParallel(make_net().float())
    shard(net, stage=stage, root=root, mixed_precision=mixed_precision_policy("bf16-mixed"))
    with torch.autocast("cpu", torch.bfloat16):
        assert backward(net, 0, 1) == backward(reference, 0, 1)
    for mine, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None
        assert mine.dtype == mine.grad.dtype == torch.float32
        torch.testing.assert_close(whole(mine.grad), theirs.grad)


@pytest.mark.parametrize("root", ["shard", "replicate"])
@pytest.mark.parametrize("stage", [2, 3])
def test_mixed_precision_under_autocast_equals_stage_0(stage: int, root: str) -> None:
    run_ranks(_autocast_equals_stage_0, 2, stage, root)


def _low_precision_keeps_masters() -> None:
    net, reference = make_net().float(), DistributedDataParallel(make_net().float())
    shard(net, mixed_precision=mixed_precision_policy("bf16-mixed", autocast=False))
    assert net.blocks[0](torch.zeros(1, WIDTH)).dtype == torch.bfloat16
    assert backward(net, 0, 1) == pytest.approx(backward(reference, 0, 1), rel=1e-2)
    for mine, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None
        assert mine.dtype == mine.grad.dtype == torch.float32
        torch.testing.assert_close(whole(mine.grad), theirs.grad, rtol=0.1, atol=2e-2)


def test_mixed_precision_without_autocast_stores_and_reduces_in_float32() -> None:
    run_ranks(_low_precision_keeps_masters, 2)


def _offload_on_cpu() -> None:
    net = make_net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shard(net, cpu_offload=True)
    backward(net, 0, 1)


def test_cpu_offload_changes_nothing_on_a_cpu_mesh() -> None:
    run_ranks(_offload_on_cpu, 2)
