"""Checkpoints of format version 1 open for ever, and are what `docs/format.md` says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import zero_ckpt
from tests.format_reader import Reader
from tests.golden import make_v1, state
from tests.told import warned
from tests.workers import run_ranks
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.errors import UnsafeObjectError

GOLDEN = Path(__file__).parent / "golden" / "v1"
TABLE = "__zero_ckpt_blocks__"


def expected_types() -> dict[str, dict[str, torch.Tensor]]:
    """Role -> key -> whole tensor, of the tag `types`."""
    model = {
        **state.typed_tensors(),
        "columns": state.numbers(50, 2, 4),
        "one_row": state.numbers(60, 1, 2),
        "replicated": state.numbers(70, 3),
        "plain": state.numbers(80, 2),
        "number": torch.tensor(90.0),
        "empty": torch.empty(0, 4),
        "only_on_0": state.numbers(95, 2),
        "only_on_1": state.numbers(96, 2),
    }
    text = b'[{"$tensor":"plain/j#entry/0"},"x"]'
    optim = {
        "columns/factor": state.numbers(110, 4),
        "plain/i#int": torch.tensor(3),
        "plain/f#float": torch.tensor(0.25, dtype=torch.float64),
        "plain/b#bool": torch.tensor(True),
        "plain/n#none": torch.empty(0, dtype=torch.uint8),
        "plain/j#json": torch.tensor(list(text), dtype=torch.uint8),
        "plain/j#entry/0": state.numbers(50, 2, 4),
    }
    return {"model": model, "optim": optim, "state": {"objects/part": model["F32"]}}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise, type and shape included."""
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def test_golden_tensors_of_every_type_open_bitwise() -> None:
    with open_checkpoint(GOLDEN, make_v1.TYPES) as checkpoint:
        for role, tensors in expected_types().items():
            assert sorted(checkpoint.keys(role)) == sorted(tensors)
            for key, tensor in tensors.items():
                assert same(checkpoint.tensor(role, key), tensor), key
        manifest = checkpoint.manifest
    assert (manifest.step, manifest.world_size, manifest.zero_stage) == (8, 2, 2)
    assert (manifest.generation, manifest.buffers, manifest.frozen) == (2, ["plain"], ["number"])
    assert (manifest.aliases, manifest.excluded) == ({"tied": "columns"}, ["left_out"])


def test_golden_objects_of_every_type_open_as_they_were() -> None:
    wanted = state.objects()
    with open_checkpoint(GOLDEN, make_v1.TYPES) as checkpoint:
        with pytest.raises(UnsafeObjectError, match=r"decimal\.Decimal"):
            checkpoint.objects()
        found = checkpoint.objects(weights_only=False)
        assert same(found.pop("part").materialize(), state.typed_tensors()["F32"])
        for rank in (0, 1):
            own = checkpoint.rank_objects(rank)
            assert own["rank"] == rank
            assert same(own["tensor"], state.numbers(rank, 2))
    assert_equal(found, wanted)
    twice = found["tensors"]["twice"]
    assert twice[0] is twice[1]


def assert_equal(found: Any, wanted: Any) -> None:
    """Equal in type and value, all the way down."""
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_equal(found[key], wanted[key])
    elif type(wanted) in (list, tuple):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_equal(a, b)
    elif isinstance(wanted, torch.Tensor):
        assert same(found, wanted)
        assert found.requires_grad == wanted.requires_grad
    elif isinstance(wanted, np.ndarray):
        assert (found.dtype, found.tobytes()) == (wanted.dtype, wanted.tobytes())
    else:
        assert repr(found) == repr(wanted)  # -0.0 is not 0.0


def test_golden_training_state_loads_into_one_process() -> None:
    net = state.Net()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with zero_ckpt.Checkpointer(net, optimizer, scheduler, rng=False) as checkpointer:
        path, client_state = checkpointer.load_checkpoint(GOLDEN)
    assert path == str(GOLDEN / make_v1.TRAINED)
    assert client_state == {"epoch": 3}
    for name, value in state.model_values().items():
        assert same(net.state_dict()[name], value), name
    parameters = dict(net.named_parameters())
    wanted = state.optimizer_values()
    assert {name for name, p in parameters.items() if optimizer.state.get(p)} == set(wanted)
    for name, values in wanted.items():
        for key, value in values.items():
            assert same(optimizer.state[parameters[name]][key], value), (name, key)
    assert (optimizer.param_groups[0]["lr"], scheduler.step_size) == (0.5, 10)


@pytest.mark.parametrize("tag", [make_v1.TRAINED, make_v1.TYPES])
def test_reader_written_from_the_specification_agrees(tag: str) -> None:
    reader = Reader(GOLDEN / tag)
    with open_checkpoint(GOLDEN, tag) as checkpoint:
        for role, tensors in reader.tensors.items():
            assert list(tensors) == checkpoint.keys(role)
            for key, (dtype, elements) in tensors.items():
                assert checkpoint.placed(role, key).dtype == dtype
                assert elements.tobytes() == raw(checkpoint.tensor(role, key)), key
    assert (GOLDEN / "latest").read_bytes() == b"global_step7\n"


def test_reader_written_from_the_specification_finds_the_objects() -> None:
    trained, types = Reader(GOLDEN / make_v1.TRAINED), Reader(GOLDEN / make_v1.TYPES)
    objects = trained.json(0, "objects")
    assert objects["client_state"] == {"epoch": 3}
    assert objects["global_step"] == 7
    assert set(objects) == {
        "client_state",
        "extra_state",
        "global_step",
        "lr_schedulers",
        "optimizers",
    }
    (group,) = objects["optimizers"][""]["groups"]
    assert set(group["params"]) == {"embed.weight", "norm.weight", "norm.bias", "unused"}
    (first, _) = types.json(0, "objects")["parameters"]
    entry, requires_grad = first["$parameter"]
    dtype, _, elements = types.file_of("state", 0)[entry, (0,)]
    assert (dtype, requires_grad, elements.tobytes()) == ("F32", True, raw(state.numbers(7, 2)))
    assert types.json(1, "rank_objects")["rank"] == 1


@pytest.mark.parametrize("tag", [make_v1.TRAINED, make_v1.TYPES])
def test_shard_files_tell_what_a_lost_manifest_said(tag: str) -> None:
    reader = Reader(GOLDEN / tag)
    (state_file,) = (GOLDEN / tag).glob("state-00000-*")
    with safe_open(state_file, "np") as file:
        kept = json.loads(file.metadata()["manifest"])
    assert set(kept) == {"step", "zero_stage", "buffers", "frozen", "excluded", "aliases"}
    assert kept == {name: reader.manifest[name] for name in kept}


def test_reader_written_from_the_specification_reads_several_blocks(tmp_path: Path) -> None:
    model = torch.nn.Linear(1500, 1000)  # 6 MB: two blocks
    handle = zero_ckpt.save_checkpoint(tmp_path, model, tag="big")
    dtype, elements = Reader(Path(handle.path)).tensors["model"]["weight"]
    assert (dtype, elements.tobytes()) == ("F32", raw(model.weight))


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a shard file says, in whatever order: its metadata, and the type, shape and bytes of each entry."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    metadata = header.pop("__metadata__")
    metadata["chunks"] = json.loads(metadata["chunks"])
    if "manifest" in metadata:
        metadata["manifest"] = json.loads(metadata["manifest"])
        metadata["manifest"].pop("content", None)  # the golden ones lack the digest of all tensors
    del header[TABLE]  # it depends on the order
    for entry in header.values():
        first, last = entry.pop("data_offsets")
        entry["bytes"] = data[begin + first : begin + last]
    return metadata, header


@pytest.mark.parametrize("save", [make_v1.save_trained, make_v1.save_types])
def test_equal_state_is_still_written_as_the_same_entries(
    save: Callable[[str], None], tmp_path: Path
) -> None:
    run_ranks(warned, 2, save, str(tmp_path))
    tag = make_v1.TRAINED if save is make_v1.save_trained else make_v1.TYPES
    # Options of torch's optimizers and the size of int differ between releases; tensors do not.
    names = sorted(p.name for p in (GOLDEN / tag).glob("*.safetensors"))
    assert names == sorted(p.name for p in (tmp_path / tag).glob("*.safetensors"))
    for name in names:
        if not (tag == make_v1.TRAINED and name.startswith("state-00000")):
            assert contents(tmp_path / tag / name) == contents(GOLDEN / tag / name), name


@pytest.mark.parametrize("path", sorted(GOLDEN.rglob("*.safetensors")), ids=lambda p: p.name)
def test_every_shard_file_opens_with_the_safetensors_library(path: Path) -> None:
    with safe_open(path, "pt") as file:
        assert all(file.get_tensor(name) is not None for name in file.keys())  # noqa: SIM118
        assert file.metadata()["format"] == "zero_ckpt"
