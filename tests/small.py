"""Small models, optimizers and schedulers for tests in one process, and comparisons down to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return (
            type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


class Holder(nn.Module):
    """Holds the given tensors: floating point ones as parameters, others as buffers."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() or tensor.is_complex():
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)


class Factored(torch.optim.Optimizer):
    """State of every kind that optimizers have: factors, scalars of all sorts, lists, nothing at all."""

    def __init__(self, params: Any, lr: float = 0.1, odd: Any = None) -> None:
        super().__init__(params, {"lr": lr, "odd": odd})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                if p.ndim == 2:
                    state["row"] = p.grad.mean(1).double()
                    state["col"] = p.grad.mean(0).half()
                else:
                    state["full"] = p.grad.bfloat16()
                state["momentum"] = None
                state["ratio"] = float("inf")
                state["flag"] = True
                state["big"] = 2**70
                state["history"] = [p.grad.clone(), {"a/b": (1, p.grad.sum())}, torch.zeros(0)]
                state["mode"] = "warm"
                state["kind"] = torch.float8_e4m3fn
                state["slot#1"] = p.grad.sum()
                p.sub_(p.grad, alpha=group["lr"])


def two_layers(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))


def one_step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """The last layer gets no gradient."""
    loss = model[1](model[0](torch.ones(2, 3))).square().sum()

    def closure() -> torch.Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        value: torch.Tensor = model[1](model[0](torch.ones(2, 3))).square().sum()
        value.backward()
        return value

    loss.backward()
    for optimizer in optimizers:
        optimizer.step(closure) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()
    model.zero_grad()


def adam_over(model: nn.Module, groups: list[list[str]]) -> torch.optim.Adam:
    parameters = dict(model.named_parameters())
    return torch.optim.Adam(
        [{"params": [parameters[name] for name in names], "lr": 0.1} for names in groups]
    )


NAMES = [f"{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]


class Meter:
    """Anything with `state_dict` and `load_state_dict` can stand where a scheduler stands."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
