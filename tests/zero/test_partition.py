"""Stage 1: the user's own optimizer, partitioned, with its groups, state and schedulers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from tests.workers import run_ranks
from tests.zero.training import Net, assert_equal, backward, make_net, train, whole_weights
from zero_ckpt import load_checkpoint, save_checkpoint
from zero_ckpt.errors import ConfigurationError
from zero_ckpt.zero import (
    check_optimizer,
    owned_parameters,
    owned_state,
    partition_optimizer,
    rebind_scheduler,
)


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": 0.2, "name": "decayed"},
        {"params": others, "weight_decay": 0.0, "lr": 3e-2, "betas": (0.8, 0.9)},
    ]


def grouped_adam(module: nn.Module) -> Optimizer:
    return torch.optim.AdamW(groups_of(module), lr=1e-2)


def momentum(module: nn.Module) -> Optimizer:
    return torch.optim.SGD(module.parameters(), lr=1e-1, momentum=0.9, nesterov=True)


def adafactor(module: nn.Module) -> Optimizer:
    # It divides by the number of elements, so it takes no empty parameter.
    return torch.optim.Adafactor([p for p in module.parameters() if p.numel()], lr=1e-1)


class Signed(Optimizer):
    """Of a user's own making: a required argument that is no default, and state beside the state."""

    def __init__(self, params: Any, strength: Callable[[int], float]) -> None:
        super().__init__(params, {"lr": 0.1})
        self.strength = strength
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.calls += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"] * self.strength(self.calls))
                    self.state[p]["sign"] = p.grad.sign()
        return loss


def halving(call: int) -> float:
    return 0.5**call


def signed(module: nn.Module) -> Optimizer:
    return Signed(module.parameters(), strength=halving)


def _any_optimizer_trains(optimize: Callable[[nn.Module], Optimizer]) -> None:
    assert_equal(train(1, optimize=optimize), train(0, optimize=optimize))


@pytest.mark.parametrize("optimize", [grouped_adam, momentum, adafactor, signed])
def test_any_optimizer_trains_as_at_stage_0(optimize: Callable[[nn.Module], Optimizer]) -> None:
    run_ranks(_any_optimizer_trains, 2, optimize)


def test_a_rank_without_parameters_trains_as_at_stage_0() -> None:
    run_ranks(_any_optimizer_trains, 4, one_parameter)


def one_parameter(module: nn.Module) -> Optimizer:
    return torch.optim.AdamW([module.embed.weight], lr=1e-2)


class TwoModes(torch.optim.SGD):
    """Keeps averaged weights beside those that it trains, and exchanges them, as schedule-free optimizers do."""

    def train(self) -> None:
        self._exchange(True)

    def eval(self) -> None:
        self._exchange(False)

    @torch.no_grad()
    def _exchange(self, training: bool) -> None:
        for group in self.param_groups:
            for p in group["params"] if group.get("training", True) is not training else ():
                other = self.state[p].setdefault("other", torch.zeros_like(p))
                p_before = p.clone()
                p.copy_(other)
                other.copy_(p_before)
            group["training"] = training


def _modes_change_everywhere() -> None:
    weights = {}
    for stage in (0, 1):
        net = make_net()
        ddp = DistributedDataParallel(net)
        optimizer: Any = TwoModes(net.parameters(), lr=0.1)
        optimizer = partition_optimizer(optimizer) if stage else optimizer
        backward(ddp, 0, 1)
        optimizer.step()
        optimizer.eval()
        averaged = whole_weights(net)
        assert optimizer.param_groups[0]["training"] is False
        optimizer.train()
        optimizer.step()
        weights[stage] = averaged, whole_weights(net)
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


def test_a_change_of_mode_changes_the_weights_of_all_ranks() -> None:
    run_ranks(_modes_change_everywhere, 2)


def _modes_are_only_the_optimizers_own() -> None:
    assert not hasattr(partition_optimizer(grouped_adam(make_net())), "train")


def test_an_optimizer_without_modes_gets_none() -> None:
    run_ranks(_modes_are_only_the_optimizers_own, 2)


def _state_is_partitioned() -> tuple[set[str], int]:
    net = make_net()
    ddp = DistributedDataParallel(net)
    user = grouped_adam(net)
    zero = partition_optimizer(user)
    assert partition_optimizer(zero) is zero
    assert owned_state(zero) == {}
    backward(ddp, 0, 1)
    zero.step()
    names = {id(p): name for name, p in net.named_parameters()}
    state = owned_state(zero)
    assert set(state) == set(owned_parameters(zero))
    for parameter, values in state.items():
        assert values["exp_avg"].shape == parameter.shape
    assert type(zero).__name__ == type(user).__name__ == "AdamW"
    assert [g.get("name") for g in zero.param_groups] == ["decayed", None]
    assert zero.param_groups[1]["betas"] == (0.8, 0.9)
    assert zero.param_groups[0] is user.param_groups[0]
    return {names[id(p)] for p in state}, sum(p.numel() for p in state)


def test_every_parameter_has_its_state_on_one_rank() -> None:
    (names_0, size_0), (names_1, size_1) = run_ranks(_state_is_partitioned, 2)
    assert names_0.isdisjoint(names_1)
    assert names_0 | names_1 == {name for name, _ in Net().named_parameters()}
    assert 0.5 < size_0 / size_1 < 2


def _partition_within_pairs(directory: str) -> tuple[set[str], list[torch.Tensor]]:
    net = make_net()
    ddp = DistributedDataParallel(net)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    zero = partition_optimizer(grouped_adam(net), process_group=pairs[dist.get_rank() // 2])
    names = {id(p): name for name, p in net.named_parameters()}
    for step in range(2):
        backward(ddp, step, 1)
        zero.step()
        zero.zero_grad()
    owned = {names[id(p)] for p in owned_parameters(zero)}
    save_checkpoint(directory, ddp, zero, step=2)
    backward(ddp, 2, 1)
    zero.step()
    after = [p.detach().clone() for p in net.parameters()]
    zero.zero_grad()
    load_checkpoint(directory, ddp, zero)
    backward(ddp, 2, 1)
    zero.step()
    assert all(torch.equal(p, then) for p, then in zip(net.parameters(), after, strict=True))
    return owned, after


def test_a_group_of_ranks_may_partition_among_itself(tmp_path: Path) -> None:
    """Each pair has all state once; it is saved once, and any rank resumes from it."""
    results = run_ranks(_partition_within_pairs, 4, str(tmp_path))
    (first, weights), (second, _), *others = results
    assert first.isdisjoint(second)
    assert first | second == {name for name, _ in Net().named_parameters()}
    assert [owned for owned, _ in others] == [first, second]
    for _, found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, weights, strict=True))


def _state_is_kept() -> None:
    def run(partition_after: int) -> dict[str, torch.Tensor]:
        net = make_net()
        ddp = DistributedDataParallel(net)
        optimizer = grouped_adam(net)
        for step in range(4):
            if step == partition_after:
                optimizer = partition_optimizer(optimizer)
            backward(ddp, step, 1)
            optimizer.step()
            optimizer.zero_grad()
        return whole_weights(net)

    torch.testing.assert_close(run(2), run(99), rtol=0, atol=0)


def test_state_from_before_is_kept() -> None:
    run_ranks(_state_is_kept, 2)


def _added_group_trains() -> None:
    def run(partition: bool) -> dict[str, torch.Tensor]:
        net = make_net()
        ddp = DistributedDataParallel(net)
        first, *rest = net.parameters()
        optimizer: Optimizer = torch.optim.AdamW([first], lr=1e-2)
        if partition:
            optimizer = partition_optimizer(optimizer)
        for step in range(4):
            if step == 2:
                optimizer.add_param_group({"params": rest, "lr": 1e-3})
            backward(ddp, step, 1)
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.param_groups[1]["lr"] == 1e-3
        assert optimizer.param_groups[1]["eps"] == 1e-8
        return whole_weights(net)

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


def test_a_group_added_later_trains() -> None:
    run_ranks(_added_group_trains, 2)


class MixedDtypes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.double()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * self.gain.double().prod()


def mixed_dtypes() -> nn.Module:
    torch.manual_seed(0)
    return MixedDtypes()


def _mixed_dtypes_train() -> None:
    assert_equal(train(1, build=mixed_dtypes), train(0, build=mixed_dtypes))


def test_parameters_of_several_dtypes_train() -> None:
    run_ranks(_mixed_dtypes_train, 2)


def _closure_runs_inside() -> None:
    def run(partition: bool) -> dict[str, torch.Tensor]:
        net = make_net()
        ddp = DistributedDataParallel(net)
        optimizer = signed(net)
        if partition:
            optimizer = partition_optimizer(optimizer)
        for step in range(2):

            def closure(step: int = step) -> float:
                optimizer.zero_grad()
                return backward(ddp, step, 1)

            assert optimizer.step(closure) > 0
        return whole_weights(net)

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


def test_a_closure_runs_within_the_step() -> None:
    run_ranks(_closure_runs_inside, 2)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lbfgs_is_refused(stage: int) -> None:
    optimizer = torch.optim.LBFGS(Net().parameters())
    check_optimizer(optimizer, 0)
    with pytest.raises(ConfigurationError, match=f"LBFGS cannot be sharded.*stage={stage}"):
        check_optimizer(optimizer, stage)


class Wrapping(torch.optim.SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.inner = torch.optim.SGD(self.param_groups, lr=0.1)


def _refused() -> None:
    net = Net()
    with pytest.raises(ConfigurationError, match="LBFGS"):
        partition_optimizer(torch.optim.LBFGS(net.parameters()))
    with pytest.raises(ConfigurationError, match=r"wraps another optimizer .*'inner'"):
        partition_optimizer(Wrapping(net.parameters()))


def test_what_cannot_be_partitioned_is_refused() -> None:
    run_ranks(_refused, 1)
    check_optimizer(Wrapping(Net().parameters()), 3)


# --- schedulers -----------------------------------------------------------------------------------


def cosine(o: Optimizer) -> LRScheduler:
    return CosineAnnealingLR(o, T_max=5)


def sequential(o: Optimizer) -> LRScheduler:
    warmup = LinearLR(o, start_factor=0.1, total_iters=2)
    return SequentialLR(o, [warmup, CosineAnnealingLR(o, 4)], milestones=[2])


def chained(o: Optimizer) -> LRScheduler:
    return ChainedScheduler([StepLR(o, 1, gamma=0.5), sequential(o)])


def one_cycle(o: Optimizer) -> LRScheduler:
    return OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=8)


def cyclic(o: Optimizer) -> LRScheduler:
    return CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=False)


def plateau(o: Optimizer) -> LRScheduler:
    return ReduceLROnPlateau(o, patience=0, factor=0.5)


def by_lambda(o: Optimizer) -> LRScheduler:
    return LambdaLR(o, [halving, halving])


class Warmup:
    """Somebody's own scheduler around another, not derived from torch's."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.after = {"warm": [CosineAnnealingLR(optimizer, 4)]}
        self.count = 0

    def step(self) -> None:
        self.count += 1
        if self.count > 2:
            self.after["warm"][0].step()
        else:
            for group in self.optimizer.param_groups:
                group["lr"] *= 1.5


def _schedule(
    build: Callable[[Optimizer], Any], partition: bool, early: bool
) -> tuple[dict[str, torch.Tensor], list[float]]:
    net = make_net()
    ddp = DistributedDataParallel(net)
    optimizer: Optimizer = grouped_adam(net)
    scheduler = build(optimizer)
    rates = []
    for step in range(6):
        if partition and step == (0 if early else 3):
            before, optimizer = optimizer, partition_optimizer(optimizer)
            rebind_scheduler(scheduler, before, optimizer)
        backward(ddp, step, 1)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(1.0) if build is plateau else scheduler.step()
        rates += [group["lr"] for group in optimizer.param_groups]
    return whole_weights(net), rates


def _scheduled(build: Callable[[Optimizer], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" among them
        warnings.filterwarnings("ignore", "The epoch parameter in", UserWarning)
        expected = _schedule(build, partition=False, early=True)
        for early in (True, False):
            found = _schedule(build, partition=True, early=early)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert len(set(expected[1])) > 2  # the schedule does change something


@pytest.mark.parametrize(
    "build", [cosine, sequential, chained, one_cycle, cyclic, plateau, by_lambda, Warmup]
)
def test_schedulers_drive_the_partitioned_optimizer(build: Callable[[Optimizer], Any]) -> None:
    run_ranks(_scheduled, 2, build)


def _still_warned() -> None:
    optimizer = momentum(Net())
    scheduler = cosine(optimizer)
    zero = partition_optimizer(optimizer)
    rebind_scheduler(scheduler, optimizer, zero)
    with pytest.warns(UserWarning, match=r"before `optimizer\.step"):
        scheduler.step()


def test_a_scheduler_that_steps_first_is_still_warned_about() -> None:
    run_ranks(_still_warned, 1)
