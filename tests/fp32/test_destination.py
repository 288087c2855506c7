"""An export never goes into a checkpoint's folder, and leaves no folder of its own when it fails."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import zero_ckpt
from tests.fp32.models import Net, save_sharded
from tests.workers import run_ranks
from zero_ckpt.errors import ConfigurationError, CorruptShardError
from zero_ckpt.fp32 import convert_zero_checkpoint_to_fp32_state_dict, export_fp32

DEEPSPEED = ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"]


@pytest.fixture
def tags(tmp_path: Path) -> tuple[Path, Path]:
    """Two tags of one directory."""
    paths = [
        zero_ckpt.save_checkpoint(tmp_path / "c", Net(seed=step), step=step).path for step in (1, 2)
    ]
    return Path(paths[0]), Path(paths[1])


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("limit", [None, "2KB"])
@pytest.mark.parametrize("name", ["", "model-00000-of-00001.safetensors", "weights.bin"])
def test_a_checkpoints_own_folder_and_another_tags_are_refused(
    tags: tuple[Path, Path], name: str, limit: str | None
) -> None:
    before = content(tags[0].parent)
    for tag in tags:
        with pytest.raises(
            ConfigurationError, match=r"manifest\.json.*Nothing was written.*c/fp32"
        ):
            export_fp32(tags[0], tag / name, max_shard_size=limit)
    assert content(tags[0].parent) == before


def test_shard_files_of_ranks_are_not_overwritten_by_files_of_the_same_names(
    tmp_path: Path,
) -> None:
    run_ranks(save_sharded, 2, tmp_path, 4)
    (tag,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert (tag / "model-00001-of-00002.safetensors").exists()
    before = content(tag)
    for source in (tag, tmp_path):
        with pytest.raises(ConfigurationError, match=r"holds manifest\.json"):
            export_fp32(source, tag, max_shard_size=2000)
    assert content(tag) == before


@pytest.mark.parametrize(
    "left", ["model-00000-of-00001", "optim-00003-of-00008", "state-00001-of-00002", "g2"]
)
def test_a_tag_that_is_not_committed_is_refused(
    tags: tuple[Path, Path], tmp_path: Path, left: str
) -> None:
    folder, name = tmp_path / "crashed", f"{left}.safetensors"
    if left == "g2":
        name = "model-00001-of-00002.g2.safetensors"
    folder.mkdir()
    (folder / name).write_bytes(b"half")
    with pytest.raises(ConfigurationError, match=f"not committed.*{name}"):
        export_fp32(tags[0], folder)
    assert content(folder) == {name: b"half"}


@pytest.mark.parametrize("name", DEEPSPEED)
def test_a_tag_of_another_system_is_refused(
    tags: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "global_step5"
    folder.mkdir()
    (folder / name).write_bytes(b"pickle")
    with pytest.raises(ConfigurationError, match="another system's checkpoint"):
        export_fp32(tags[0], folder, format="bin")
    assert content(folder) == {name: b"pickle"}


def test_a_tags_folder_in_an_object_store_is_refused_whatever_its_suffix(
    tags: tuple[Path, Path],
) -> None:
    saved = zero_ckpt.save_checkpoint("memory://refused/c", Net(), tag="a.ckpt", step=1).path
    for output in (saved, f"{saved}/model.safetensors"):
        with pytest.raises(ConfigurationError, match=r"manifest\.json"):
            export_fp32(tags[0], output)


def test_deepspeeds_name_for_it_refuses_the_same(tags: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigurationError, match=r"manifest\.json"):
        convert_zero_checkpoint_to_fp32_state_dict(tags[0].parent, tags[1])


def test_lightnings_callback_warns_and_the_checkpoint_stays(tags: tuple[Path, Path]) -> None:
    from zero_ckpt.lightning import Fp32Export

    before = content(tags[0].parent)
    callback = Fp32Export(dirpath=tags[1])
    trainer = SimpleNamespace(
        fast_dev_run=False,
        barebones=False,
        global_rank=0,
        strategy=SimpleNamespace(broadcast=lambda value: value),
        checkpoint_callbacks=[SimpleNamespace(last_model_path=str(tags[0]))],
    )
    with pytest.warns(UserWarning, match=r"export failed.*manifest\.json"):
        callback.run(trainer)
    assert content(tags[0].parent) == before


def test_beside_the_tags_and_into_an_earlier_result_is_fine(tags: tuple[Path, Path]) -> None:
    directory = tags[0].parent
    for output in (directory / "fp32", directory / "fp32", directory, tags[0] / "fp32"):
        assert export_fp32(directory, output, max_shard_size="2KB")


def damage(tag: Path) -> None:
    shard = tag / "model-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[4096 + 8] ^= 1
    shard.write_bytes(data)


def test_a_failed_export_leaves_no_folder_that_it_made(
    tags: tuple[Path, Path], tmp_path: Path
) -> None:
    damage(tags[0])
    (tmp_path / "there").mkdir()
    for output in ("a/b/weights.safetensors", "a/b", "there", "there/c"):
        with pytest.raises(CorruptShardError):
            export_fp32(tags[0], tmp_path / output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "there"]
    assert list((tmp_path / "there").iterdir()) == []
