"""Checkpoints that are not as they were saved: found before anything changes, told, and passed over if none was named.

Each damage is done to the newest of two checkpoints. Naming it raises on every rank, and no live bit has changed; not
naming it loads the older one, with a warning that says what is wrong with the newest.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.faults.jobs import Job, Raised, raised, step_saved
from tests.told import told_once, warned
from tests.workers import run_ranks
from zero_ckpt.core.finding import without_advice
from zero_ckpt.core.local_storage import LocalStorage
from zero_ckpt.core.memory import ALIGNMENT
from zero_ckpt.core.shard_reader import ShardReader
from zero_ckpt.core.storage import FileReader
from zero_ckpt.testing import FaultyStorage, Operation, fail_at

WORLD = 2


@dataclass(frozen=True)
class Loaded:
    """The outcome of a load that did not raise, on one rank."""

    tag: str
    warnings: list[str]
    bits: str


@dataclass(frozen=True)
class Attempt:
    """One rank's outcomes: of naming the damaged tag, and of naming none."""

    named: Raised | Loaded
    implied: Raised | Loaded


def load_each(directories: list[str], tag: str | None) -> list[Attempt]:
    job = Job.at(7, sharded=True)
    attempts = []
    for directory in directories:
        found = []
        for asked in (tag, None):
            before = job.bits()
            outcome = attempt(job, directory, asked)
            if isinstance(outcome, Raised):
                assert job.bits() == before, f"{directory}: a load that raised changed live state"
            else:
                job = Job.at(7, sharded=True)
            found.append(outcome)
        attempts.append(Attempt(*found))
    return attempts


def attempt(job: Job, directory: str, tag: str | None) -> Raised | Loaded:
    try:
        loaded, texts = warned(job.load, directory, tag=tag)
    except Exception as error:
        return Raised(type(error).__name__, str(error))
    return Loaded(loaded, texts, job.bits())


def bits_at(step: int) -> str:
    return Job.at(step, sharded=True).bits()


@dataclass(frozen=True)
class Start:
    """A directory with `step1` and `step2`, and the bits that each rank should load from the first."""

    directory: Path
    old: list[str]

    def damaged(self, root: Path, damages: list[Callable[[Path], None]]) -> list[Path]:
        """A copy for each damage, done to it."""
        directories = []
        for number, damage in enumerate(damages):
            directory = root / str(number)
            shutil.copytree(self.directory, directory)
            damage(directory / "step2")
            directories.append(directory)
        return directories


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    directory = tmp_path_factory.mktemp("start") / "checkpoints"
    run_ranks(save_two, WORLD, str(directory))
    return Start(directory, run_ranks(bits_at, WORLD, 1))


def save_two(directory: str) -> None:
    for step in (1, 2):
        step_saved(directory, step, sharded=True)


def load_damaged(directories: list[Path], tag: str | None = "step2") -> list[list[Attempt]]:
    """Outcomes by directory, and in it by rank."""
    by_rank = run_ranks(load_each, WORLD, [str(d) for d in directories], tag, timeout=100)
    return [list(attempts) for attempts in zip(*by_rank, strict=True)]


def check_damage(start: Start, attempts: list[Attempt], kinds: set[str]) -> str:
    """All ranks raised the same; all fell back to the same, and rank 0 said why. Returns the error's text."""
    assert len({attempt.named for attempt in attempts}) == 1, attempts
    error = attempts[0].named
    assert isinstance(error, Raised), error
    assert error.kind in kinds, error
    told = []
    for attempt, bits in zip(attempts, start.old, strict=True):
        loaded = attempt.implied
        assert isinstance(loaded, Loaded), loaded
        assert loaded.tag == "step1"
        assert loaded.bits == bits
        told.append(loaded.warnings)
    (text,) = told_once(told)
    assert text.startswith("falling back to ")
    assert without_advice(error.text) in text
    return error.text


# The manifest


def truncate(name: str, nbytes: int) -> Callable[[Path], None]:
    """Cut a file to `nbytes`, or by as many when negative."""

    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:nbytes])

    return damage


def flip(name: str, at: int) -> Callable[[Path], None]:
    """Flip one bit of byte `at`, counted from the end when negative."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 0x10
        (folder / name).write_bytes(data)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def manifest_damages(start: Start) -> list[Callable[[Path], None]]:
    data = (start.directory / "step2" / "manifest.json").read_bytes()
    head, end = data.index(b"\n") + 1, len(data)
    cuts = [0, 1, head // 2, head - 1, head, head + 1, end // 2, end - 3, end - 2, end - 1]
    places = [0, 12, 14, 30, 60, head - 1, head, head + 50, end // 3, end // 2, end - 4, end - 1]
    name = "manifest.json"
    return [truncate(name, cut) for cut in cuts] + [flip(name, place) for place in places]


def test_a_manifest_that_was_cut_or_changed_anywhere(start: Start, tmp_path: Path) -> None:
    directories = start.damaged(tmp_path, manifest_damages(start))
    for directory, attempts in zip(directories, load_damaged(directories), strict=True):
        text = check_damage(start, attempts, {"CorruptManifestError", "FormatVersionError"})
        assert text.startswith(f"{directory}/step2/manifest.json: ")


def test_a_manifest_that_is_missing(start: Start, tmp_path: Path) -> None:
    directories = start.damaged(tmp_path, [remove("manifest.json")])
    (attempts,) = load_damaged(directories)
    text = check_damage(start, attempts, {"CheckpointNotFoundError"})
    assert text.startswith(f"{directories[0]}/step2: not committed: it holds shard files, but no")


# Shard files


def shard_damages(start: Start, name: str) -> dict[str, Callable[[Path], None]]:
    path = start.directory / "step2" / name
    reader = ShardReader(LocalStorage().open(str(path)), name, None)
    first, stop, end = reader.data_start, reader.data_start + reader.data_bytes, path.stat().st_size
    reader.close()
    return {
        "missing": remove(name),
        "empty": truncate(name, 0),
        "cut in the length": truncate(name, 5),
        "cut in the header": truncate(name, 500),
        "cut before the data": truncate(name, first),
        "cut in the data": truncate(name, first + 9),
        "cut by one byte": truncate(name, end - 1),
        "one byte longer": lambda folder: (folder / name).write_bytes(path.read_bytes() + b"\0"),
        "flip in the length": flip(name, 1),
        "flip in the header": flip(name, 20),
        "flip in the header's padding": flip(name, first - 1),
        "flip in the first byte of data": flip(name, first),
        "flip in the last byte of data": flip(name, stop - 1),
        "flip in the block table": flip(name, end - 1),
    }


@pytest.mark.parametrize(
    "name",
    [
        "model-00000-of-00002.safetensors",
        "model-00001-of-00002.safetensors",
        "optim-00001-of-00002.safetensors",
        "state-00000-of-00002.safetensors",
        "state-00001-of-00002.safetensors",
    ],
)
def test_a_shard_file_that_was_changed_anywhere(name: str, start: Start, tmp_path: Path) -> None:
    """Found by one rank only, told by all, before any live tensor changed."""
    damages = shard_damages(start, name)
    directories = start.damaged(tmp_path, list(damages.values()))
    results = load_damaged(directories)
    for what, directory, attempts in zip(damages, directories, results, strict=True):
        text = check_damage(start, attempts, {"CorruptShardError"})
        assert f"{directory}/step2/{name}: " in text, what
        if "data" in what and "flip" in what:
            assert "checksum" in text, what
            assert "block 0 (bytes " in text, what


def test_a_flip_in_a_later_block_names_the_block_and_its_tensors(tmp_path: Path) -> None:
    run_ranks(save_wide, WORLD, str(tmp_path))
    name = "model-00001-of-00002.safetensors"
    reader = ShardReader(LocalStorage().open(f"{tmp_path}/step1/{name}"), name, None)
    assert reader.num_blocks > 1
    start = reader.data_start
    reader.close()
    flip(name, start + (4 << 20) + 7)(tmp_path / "step1")
    errors = run_ranks(load_wide, WORLD, str(tmp_path))
    assert errors[0] == errors[1]
    assert errors[0].kind == "CorruptShardError"
    text = errors[0].text
    assert text.startswith(f"rank 1: {tmp_path}/step1/{name}: block 1 (bytes {start + (4 << 20)}-")
    assert "'first.weight'" in text
    assert "Run 'zero-ckpt verify'" in text


WIDE = 400_000


def save_wide(directory: str) -> None:
    Job.at(1, sharded=True, width=WIDE).save(directory)


def load_wide(directory: str) -> Raised:
    job = Job.at(0, sharded=True, width=WIDE)
    before = job.bits()
    error = raised(job.load, directory, tag="step1")
    assert job.bits() == before
    return error


MODELS = [f"model-0000{rank}-of-00002.safetensors" for rank in range(WORLD)]


def swap_ranks(folder: Path) -> None:
    one, other = (folder / name for name in MODELS)
    content = one.read_bytes()
    other.replace(one)
    other.write_bytes(content)


def take_from(source: Path, names: list[str]) -> Callable[[Path], None]:
    """Put another checkpoint's files, of whatever generation, in the place of this one's."""

    def damage(folder: Path) -> None:
        for name in names:
            (found,) = source.glob(f"{name.removesuffix('.safetensors')}*.safetensors")
            shutil.copy(found, folder / name)

    return damage


def overwrite_step2(directory: str) -> None:
    Job.at(3, sharded=True).save(directory, tag="step2")


def test_files_of_another_checkpoint_are_not_taken_for_this_one(
    start: Start, tmp_path: Path
) -> None:
    """Another tag's files, the same tag's of another generation, another rank's: one of them, or all."""
    newer = tmp_path / "newer"
    shutil.copytree(start.directory, newer)
    run_ranks(overwrite_step2, WORLD, str(newer))
    assert list((newer / "step2").glob("*.g2.safetensors"))
    every = [path.name for path in (start.directory / "step2").glob("*.safetensors")]
    damages = [swap_ranks]
    for source in (start.directory / "step1", newer / "step2"):
        damages += [take_from(source, MODELS[:1]), take_from(source, every)]
    for attempts in load_damaged(start.damaged(tmp_path, damages)):
        text = check_damage(start, attempts, {"CorruptShardError"})
        assert "header and block table: checksum" in text or "bytes expected" in text


# A disk that returns other bytes when it is asked again


class Fickle(LocalStorage):
    """Returns the right bytes of a block of model data once, and then others."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, int]] = set()

    def open(self, path: str) -> FileReader:
        reader = super().open(path)
        if "model-" not in path:
            return reader
        read_into, seen = reader.read_into, self.seen

        def fickle(offset: int, nbytes: int, buffer: memoryview, keep: bool = False) -> None:
            read_into(offset, nbytes, buffer, keep)
            if offset >= ALIGNMENT and (path, offset) in seen:
                buffer[0] ^= 1
            seen.add((path, offset))

        reader.read_into = fickle  # type: ignore[method-assign]
        return reader


def load_fickle(directory: str) -> tuple[Raised, bool]:
    storage = Fickle()
    job = Job.at(7, sharded=True, storage=storage)
    before = job.bits()
    error = raised(job.load, directory, tag="step2")
    assert storage.seen
    return error, job.bits() == before


def test_a_disk_that_returns_other_bytes_the_second_time(start: Start) -> None:
    """What was verified is verified again when it is read into the live state."""
    results = run_ranks(load_fickle, WORLD, str(start.directory))
    assert results[0][0] == results[1][0]
    error = results[0][0]
    assert error.kind == "CorruptShardError"
    assert "checksum" in error.text
    untouched = all(same for _, same in results)
    assert untouched or "OVERWRITTEN IN PART" in error.text


# `latest`


def write_latest(data: bytes) -> Callable[[Path], None]:
    return lambda folder: folder.with_name("latest").write_bytes(data) and None


def folder_as_latest(folder: Path) -> None:
    folder.with_name("latest").unlink()
    folder.with_name("latest").mkdir()


LATEST: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda folder: folder.with_name("latest").unlink(), "latest is missing"),
    "empty": (write_latest(b""), "latest names no tag, it holds ''"),
    "blank": (write_latest(b" \n"), "latest names no tag, it holds ' \\n'"),
    "binary": (write_latest(b"\xff\xfe\x00"), "latest cannot be read: it is no text"),
    "long": (
        write_latest(b"x" * 5000),
        "latest cannot be read: it is 5000 bytes long, longer than the 4096 bytes",
    ),
    "outside": (write_latest(b"../step1\n"), "latest names no tag, it holds '../step1\\n'"),
    "nothing": (write_latest(b"step9\n"), "step9: no such checkpoint; "),
    "folder": (folder_as_latest, "latest cannot be read: Is a directory"),
}


def test_a_latest_that_names_nothing_leads_to_the_newest_with_a_warning(
    start: Start, tmp_path: Path
) -> None:
    directories = start.damaged(tmp_path, [damage for damage, _ in LATEST.values()])
    results = load_damaged(directories)
    for (what, (_, told)), attempts in zip(LATEST.items(), results, strict=True):
        texts = []
        for attempt in attempts:
            assert isinstance(attempt.named, Loaded)
            assert attempt.named.warnings == []
            assert isinstance(attempt.implied, Loaded)
            assert attempt.implied.tag == "step2"
            assert attempt.implied.bits == attempt.named.bits
            texts.append(attempt.implied.warnings)
        (text,) = told_once(texts)
        assert text.startswith("falling back to "), what
        assert told in text, what


# Nothing whole is left


def both(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    def damages(folder: Path) -> None:
        damage(folder)
        damage(folder.with_name("step1"))

    return damages


def test_a_directory_of_damaged_checkpoints_is_not_called_empty(
    start: Start, tmp_path: Path
) -> None:
    """Whoever starts from scratch when there is no checkpoint must not do so when there are damaged ones."""
    model = "model-00001-of-00002.safetensors"
    damages = {
        "data": both(flip(model, 4200)),
        "length": both(truncate(model, 4200)),
        "manifest": both(flip("manifest.json", 100)),
        "no manifest": both(remove("manifest.json")),
    }
    results = load_damaged(start.damaged(tmp_path, list(damages.values())))
    for what, attempts in zip(damages, results, strict=True):
        assert len({attempt.implied for attempt in attempts}) == 1
        error = attempts[0].implied
        assert isinstance(error, Raised)
        assert error.kind == "CorruptCheckpointError", what
        assert "no checkpoint here is whole" in error.text
        assert "step2" in error.text
        assert "step1" in error.text or what == "no manifest"
        assert ("zero-ckpt repair" in error.text) is ("manifest" in what)
        assert not re.search("(earlier|another) tag|other tags", error.text), "there is none"


def newer(folder: Path) -> None:
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(data.replace(b'{"zero_ckpt": 1,', b'{"zero_ckpt": 2,'))


def test_a_newer_format_is_refused_and_not_passed_over(start: Start, tmp_path: Path) -> None:
    """Falling back would quietly lose work that a newer version of the package can load."""
    (attempts,) = load_damaged(start.damaged(tmp_path, [newer]))
    for attempt in attempts:
        for error in (attempt.named, attempt.implied):
            assert isinstance(error, Raised)
            assert error.kind == "FormatVersionError"
            assert "format version 2; this zero_ckpt reads up to version 1" in error.text
            assert "Upgrade zero-ckpt" in error.text


# Folders of something else


def others(root: Path) -> dict[str, Path]:
    """What users point at by mistake."""
    made = {name: root / name for name in ("empty", "dcp", "deepspeed", "huggingface", "lightning")}
    for folder in made.values():
        folder.mkdir(parents=True)
    (made["dcp"] / ".metadata").write_bytes(b"\x80\x05")
    (made["dcp"] / "__0_0.distcp").write_bytes(b"PK")
    (made["deepspeed"] / "latest").write_text("global_step1")
    (made["deepspeed"] / "global_step1").mkdir()
    (made["deepspeed"] / "global_step1" / "mp_rank_00_model_states.pt").write_bytes(b"PK")
    (made["huggingface"] / "model-00001-of-00002.safetensors").write_bytes(b"x")
    (made["huggingface"] / "model.safetensors.index.json").write_text("{}")
    (made["lightning"] / "last.ckpt").write_bytes(b"PK")
    made["missing"] = root / "missing"
    made["file"] = made["lightning"] / "last.ckpt"
    return made


FOUND = {
    "empty": "no committed checkpoint here, it is empty. Give the checkpoint directory",
    "dcp": "it holds '.metadata', '__0_0.distcp', a checkpoint of torch.distributed.checkpoint. Give",
    "deepspeed": "mp_rank_00_model_states.pt: a file written by torch.save expected, 2 bytes found",
    "huggingface": "it holds 'model-00001-of-00002.safetensors', 'model.safetensors.index.json'. Give",
    "lightning": "it holds 'last.ckpt', with plain files of Lightning's, of which ckpt_path and torch.load take one",
    "missing": "no such checkpoint directory",
    "file": "a file, where a checkpoint directory or a tag's folder was expected",
}


def test_a_folder_of_something_else_is_said_to_be_that(tmp_path: Path) -> None:
    made = others(tmp_path)
    results = load_damaged(list(made.values()), "step2")
    for (what, path), attempts in zip(made.items(), results, strict=True):
        assert len(set(attempts)) == 1
        for error in (attempts[0].named, attempts[0].implied):
            assert isinstance(error, Raised)
            assert error.text.startswith(str(path))
        damaged = (
            what == "deepspeed"
        )  # its latest names a checkpoint, of which a file is no such file
        known = what in ("file", "deepspeed")  # something was saved there
        nothing = "CheckpointNotFoundError" if known else "NothingSavedError"
        assert attempts[0].named.kind == nothing
        assert (attempts[0].implied.kind == "CorruptCheckpointError") is damaged
        assert FOUND[what] in attempts[0].implied.text, what


# A disk that fails while it is read


def load_from_failing_disk(
    directory: str, victim: int
) -> tuple[list[str], list[tuple[Raised, bool]]]:
    """Each operation of the victim's load fails in turn: (its names, errors and whether no bit has changed)."""
    probe = FaultyStorage(LocalStorage())
    Job.at(7, storage=probe).load(directory, tag="step2")
    names = [[operation.name for operation in probe.log]]
    dist.broadcast_object_list(names, src=victim)
    found = []
    for number in range(len(names[0])):
        hook = fail_at(number, errno.EIO) if dist.get_rank() == victim else ignore
        job = Job.at(7, storage=FaultyStorage(LocalStorage(), hook))
        before = job.bits()
        error = raised(job.load, directory, tag="step2")
        found.append((error, job.bits() == before))
    return names[0], found


def ignore(_: Operation) -> None:
    pass


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_at_any_operation_of_a_load(victim: int, start: Start) -> None:
    results = run_ranks(load_from_failing_disk, WORLD, str(start.directory), victim, timeout=100)
    names, _ = results[0]
    assert {"get", "open", "read"} <= set(names)
    seen = set()
    for number, name in enumerate(names):
        (error, untouched), (other, other_untouched) = (result[1][number] for result in results)
        assert error == other, (name, error, other)
        assert error.kind.startswith("Corrupt"), (name, error)
        assert "cannot be read: Input/output error" in error.text, (name, error)
        torn = "OVERWRITTEN IN PART" in error.text
        assert torn or (untouched and other_untouched), name
        seen.add(torn)
    assert seen == {True, False}
