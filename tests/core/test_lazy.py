"""Lazy tensors say what they are without reading, read what is needed, and else behave as tensors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.workers import run_ranks
from zero_ckpt.core.chunks import Box, full_box
from zero_ckpt.core.lazy import LazyTensor
from zero_ckpt.core.objects import decode_objects, encode_objects

VALUES = torch.arange(24.0).reshape(4, 6)
_reads: list[Box] = []


@pytest.fixture
def lazy() -> LazyTensor:
    return lazy_of(VALUES)


def lazy_of(values: torch.Tensor) -> LazyTensor:
    _reads.clear()

    def read(box: Box) -> torch.Tensor:
        _reads.append(box)
        return values[box.slices()].clone()

    return LazyTensor("model", "w", tuple(values.shape), values.dtype, read)


def test_what_it_is_needs_no_reading(lazy: LazyTensor) -> None:
    assert isinstance(lazy, torch.Tensor)
    assert lazy.shape == lazy.size() == (4, 6)
    assert lazy.size(1) == len(lazy[0]) == 6
    _reads.clear()
    assert (lazy.dtype, lazy.device.type, lazy.ndim, lazy.dim()) == (torch.float32, "cpu", 2, 2)
    assert (lazy.numel(), lazy.nelement(), lazy.nbytes, lazy.element_size()) == (24, 24, 96, 4)
    assert (lazy.layout, lazy.itemsize, len(lazy)) == (torch.strided, 4, 4)
    assert lazy.is_floating_point()
    assert not lazy.is_complex()
    assert lazy.is_contiguous()
    assert lazy.stride() == (6, 1)
    assert not lazy.requires_grad
    assert lazy.is_leaf
    assert lazy.grad is None
    assert not lazy.is_meta
    assert not lazy.is_cuda
    assert not lazy.is_sparse
    assert hash(lazy) == hash(lazy)
    assert repr(lazy) == "LazyTensor('w', shape=[4, 6], dtype=torch.float32)"
    assert (lazy.role, lazy.key, lazy.is_read) == ("model", "w", False)
    assert not _reads


USES: dict[str, Callable[[torch.Tensor], Any]] = {
    "add": lambda t: t + 1,
    "radd": lambda t: 1 + t,
    "matmul": lambda t: t @ t.t(),
    "compare": lambda t: t == VALUES,
    "clone": lambda t: t.clone(),
    "detach": lambda t: t.detach(),
    "contiguous": lambda t: t.contiguous(),
    "to": lambda t: t.to(torch.float64),
    "cpu": lambda t: t.cpu(),
    "numpy": lambda t: torch.from_numpy(t.numpy()),
    "asarray": lambda t: torch.from_numpy(np.asarray(t)),
    "tolist": lambda t: torch.tensor(t.tolist()),
    "stack": lambda t: torch.stack([t, t]),
    "cat": lambda t: torch.cat((t, VALUES)),
    "chunk": lambda t: t.chunk(2)[1],
    "view": lambda t: t.view(-1),
    "reshape": lambda t: t.reshape(2, 12),
    "sum": lambda t: t.sum(),
    "copy_ from": lambda t: torch.zeros(4, 6).copy_(t),
    "new_zeros": lambda t: t.new_zeros(2),
    "zeros_like": torch.zeros_like,
    "equal": lambda t: torch.tensor(torch.equal(t, VALUES)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "save": lambda t: saved_and_loaded(t),
    "parameter": lambda t: nn.Parameter(t.clone()),
    "iterate": lambda t: torch.stack(list(t)),
    "mask": lambda t: t[t > 5],
    "fancy": lambda t: t[[0, 2]],
    "ellipsis": lambda t: t[..., 1],
    "new axis": lambda t: t[None, 1],
    "step": lambda t: t[::2],
    "tensor index": lambda t: t[torch.tensor([1, 1])],
    "numel of values": lambda t: torch.tensor(t.untyped_storage().nbytes()),
}


def saved_and_loaded(tensor: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save({"t": tensor}, file)
    file.seek(0)
    found: torch.Tensor = torch.load(file, weights_only=True)["t"]
    return found


@pytest.mark.parametrize("use", USES)
def test_used_as_a_tensor_it_has_the_values(use: str, lazy: LazyTensor) -> None:
    found, expected = USES[use](lazy), USES[use](VALUES)
    assert type(found) is type(expected)
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype


def test_a_chain_of_changes_stays_in_it(lazy: LazyTensor) -> None:
    assert lazy.mul_(2).add_(1) is lazy
    assert torch.equal(lazy.clone(), VALUES * 2 + 1)
    assert lazy.cpu() is not lazy


def test_values_that_were_changed_are_not_read_again(lazy: LazyTensor) -> None:
    lazy.mul_(2)
    assert torch.equal(lazy + 0, VALUES * 2)
    assert lazy.is_read
    assert torch.equal(lazy[1], VALUES[1] * 2)
    assert _reads == [full_box((4, 6))]


KEPT: dict[str, Callable[[torch.Tensor], Any]] = {
    "changed in place": lambda t: t.mul_(2),
    "changed as an argument": lambda t: torch._foreach_mul_([t], 2.0),
    "view": lambda t: t.view(-1),
    "detach": lambda t: t.detach(),
    "numpy": lambda t: t.numpy(),
    "rows": lambda t: list(t),
    "in inference mode": torch.inference_mode()(lambda t: t + 1),
}
DROPPED: dict[str, Callable[[torch.Tensor], Any]] = {
    "contiguous": lambda t: t.contiguous(),
    "clone": lambda t: t.clone(),
    "copy_ from": lambda t: torch.zeros(4, 6).copy_(t),
    "to another dtype": lambda t: t.double(),
    "arithmetic": lambda t: t + t,
    "tolist": lambda t: t.tolist(),
    "equal": lambda t: torch.equal(t, VALUES),
}


@pytest.mark.parametrize("use", KEPT)
def test_values_stay_where_somebody_could_tell(use: str, lazy: LazyTensor) -> None:
    KEPT[use](lazy)
    assert lazy.is_read


@pytest.mark.parametrize("use", DROPPED)
def test_values_take_no_memory_once_they_were_used(use: str, lazy: LazyTensor) -> None:
    DROPPED[use](lazy)
    assert not lazy.is_read
    assert _reads == [full_box((4, 6))]


def test_a_module_loads_from_lazy_tensors_without_reading_more(lazy: LazyTensor) -> None:
    module = nn.Linear(6, 4, bias=False)
    module.load_state_dict({"weight": lazy})
    assert torch.equal(module.weight, VALUES)
    assert not lazy.is_read
    assert _reads == [full_box((4, 6))]


index = st.integers(-4, 3) | st.slices(4).filter(lambda s: s.step in (None, 1))


@given(st.tuples(index) | st.tuples(index, st.integers(-6, 5) | st.slices(6)))
def test_indexing_gives_what_torch_gives(key: tuple[Any, ...]) -> None:
    if any(isinstance(k, slice) and (k.step or 1) < 0 for k in key):
        return  # torch has no negative steps
    lazy = lazy_of(VALUES)
    assert torch.equal(lazy[key], VALUES[key])
    assert lazy[key].shape == VALUES[key].shape


def test_indexing_reads_only_what_it_needs(lazy: LazyTensor) -> None:
    assert torch.equal(lazy[1:3, 2], VALUES[1:3, 2])
    assert torch.equal(lazy[-1], VALUES[-1])
    assert _reads == [Box((1, 2), (2, 1)), Box((3, 0), (1, 6))]
    assert not lazy.is_read
    assert torch.equal(lazy.read_box(Box((0, 1), (2, 2))), VALUES[:2, 1:3])


@pytest.mark.parametrize("key", [4, -5, (0, 6), (0, 0, 0)])
def test_an_index_outside_is_an_index_error(key: Any, lazy: LazyTensor) -> None:
    with pytest.raises(IndexError):
        lazy[key]


@pytest.mark.parametrize("values", [torch.tensor(3), torch.zeros(0, 2), torch.tensor([True])])
def test_scalars_and_empty_tensors(values: torch.Tensor) -> None:
    lazy = lazy_of(values)
    assert torch.equal(lazy + 0, values + 0)
    assert torch.equal(lazy[()], values)
    assert lazy.tolist() == values.tolist()


def test_an_error_of_reading_is_raised_where_it_is_used() -> None:
    def read(box: Box) -> torch.Tensor:
        raise ValueError("damaged")

    lazy = LazyTensor("model", "w", (2,), torch.float32, read)
    for use in (lambda: lazy + 1, lambda: lazy[0], lambda: torch.zeros(2).copy_(lazy)):
        with pytest.raises(ValueError, match="damaged"):
            use()


def test_stored_in_objects_it_is_a_plain_tensor(lazy: LazyTensor) -> None:
    encoded = encode_objects([lazy], "objects")
    (found,) = decode_objects(encoded.json, encoded.entries.__getitem__, dtensor=str)
    assert type(found) is torch.Tensor
    assert torch.equal(found, VALUES)


def _meet_dtensors() -> None:
    mesh = init_device_mesh("cpu", (2,))
    parts = {
        "w": distribute_tensor(VALUES.clone(), mesh, [Shard(0)]),
        "b": distribute_tensor(torch.arange(6.0), mesh, [Shard(0)]),
    }
    lazies = {"w": lazy_of(VALUES), "b": lazy_of(torch.arange(6.0))}
    torch._foreach_add_(list(lazies.values()), list(parts.values()))
    for name, lazy in lazies.items():  # changed with parts, they are parts
        assert isinstance(lazy.materialize(), DTensor)
        assert torch.equal(lazy.full_tensor(), parts[name].full_tensor() * 2)
    row = lazy_of(torch.arange(6.0))  # of another shape than what it meets
    assert torch.equal((parts["w"] + row).full_tensor(), VALUES + torch.arange(6.0))
    assert not row.is_read
    average = lazy_of(VALUES)
    average.mul_(0.5).add_(parts["w"], alpha=0.5)
    assert torch.equal(average.full_tensor(), VALUES)
    assert not hasattr(row, "full_tensor")


def test_one_that_meets_dtensors_is_combined_with_them_part_by_part() -> None:
    run_ranks(_meet_dtensors, 2)
