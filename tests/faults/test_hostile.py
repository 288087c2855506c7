"""Checkpoints whose files anybody may have written: nothing waits for ever, nothing outside the directory is opened,
and every error is a documented one. Drawn by hypothesis, with right checksums; `test_lies` tells chosen lies.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.jobs import contents
from tests.faults.lies import Change, rewrite_manifest, rewrite_shard
from zero_ckpt import Checkpointer, get_fp32_state_dict_from_zero_checkpoint
from zero_ckpt.cli import main
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.errors import ZeroCkptError
from zero_ckpt.testing import FaultyStorage

MODEL, STATE = (f"{role}-00000-of-00001.safetensors" for role in ("model", "state"))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("honest")
    model = torch.nn.Linear(3, 2)
    Checkpointer(model, torch.optim.SGD(model.parameters())).save_checkpoint(
        directory, "tag", client_state={"epoch": 3}
    )
    return directory


@pytest.fixture
def copy(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "copy"))


# What is no file


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["latest", "tag/manifest.json", f"tag/{MODEL}"])
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_refused_at_once(
    name: str, kind: str, copy: Path
) -> None:
    (copy / name).unlink()
    if kind == "pipe":
        os.mkfifo(copy / name)
    else:
        (copy / name).symlink_to("/dev/zero")
    if name == "latest":
        with pytest.warns(UserWarning, match="latest cannot be read: a pipe, a socket or a device"):
            assert contents(copy)
        return
    for door in (contents, get_fp32_state_dict_from_zero_checkpoint):
        with pytest.raises(ZeroCkptError, match=os.path.basename(name)):
            door(copy)
    assert main(["verify", str(copy)]) == 1
    main(["repair", str(copy)])  # which may find nothing to do, or refuse, but returns


# What is drawn

NASTY = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    1e308,
    "",
    "/",
    "..",
    "../tag",
    "/etc/passwd",
    [],
    {},
    [[]],
]
values = (
    st.sampled_from(NASTY)
    | st.integers()
    | st.text(max_size=4)
    | st.lists(st.integers(), max_size=3)
)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) of a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def disturbed(data: st.DataObject) -> Change:
    """Replaces, removes or renames up to three values."""

    def change(tree: Any) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            container, key = data.draw(st.sampled_from(list(places(tree)) or [(tree, "x")]))
            how = data.draw(st.sampled_from(["replace", "remove", "rename"]))
            if how == "replace":
                container[key] = data.draw(values)
            elif how == "remove":
                container.pop(key, None) if isinstance(container, dict) else container.pop(key)
            elif isinstance(container, dict) and key in container:
                container[str(data.draw(values))] = container.pop(key)

    return change


def open_all(directory: Path) -> None:
    """Read every byte. Only documented errors, and no path outside the directory."""
    disk = FaultyStorage(LocalStorage(), names={"open", "get", "list"})
    with warnings.catch_warnings(), suppress(ZeroCkptError):
        warnings.simplefilter("ignore")
        contents(directory, storage=disk)
    for operation in disk.log:
        assert os.path.normpath(operation.path) == operation.path
        assert Path(operation.path).is_relative_to(directory)
    assert disk.log


drawn = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@drawn
@given(data=st.data())
def test_any_manifest_is_read_or_refused(data: st.DataObject, honest: Path, copy: Path) -> None:
    shutil.copy(honest / "tag" / "manifest.json", copy / "tag")
    rewrite_manifest(copy / "tag", disturbed(data))
    open_all(copy)


@pytest.mark.parametrize("name", [MODEL, STATE])
@drawn
@given(data=st.data())
def test_any_header_is_read_or_refused(
    name: str, data: st.DataObject, honest: Path, copy: Path
) -> None:
    for file in ("manifest.json", name):
        shutil.copy(honest / "tag" / file, copy / "tag")

    def change(entries: dict[str, Any]) -> bytes | None:
        chunks = json.loads(entries["__metadata__"]["chunks"])
        tree = {"entries": entries, "chunks": chunks}
        disturb_inside(tree, disturbed(data))
        if isinstance(entries.get("__metadata__"), dict):
            entries["__metadata__"]["chunks"] = json.dumps(chunks)
        return json.dumps(entries).encode()

    rewrite_shard(copy / "tag", name, change)
    open_all(copy)


def disturb_inside(tree: dict[str, Any], change: Callable[[Any], Any]) -> None:
    """Change what is in the tree's two parts; the parts themselves stay."""
    change(tree["entries"])
    change(tree["chunks"])


@drawn
@given(content=st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_any_latest_leads_to_a_checkpoint_in_the_directory(content: bytes, copy: Path) -> None:
    (copy / "latest").write_bytes(content)
    open_all(copy)
