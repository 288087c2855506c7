from __future__ import annotations

import os
from pathlib import Path

from tests.cli.conftest import Command, flip


def _row(lines: list[str], name: str) -> list[str]:
    (line,) = (line for line in lines if line.startswith(f"{name} "))
    return line.split()


def test_a_directory_shows_its_latest(sharded: Path, command: Command) -> None:
    result = command("inspect", sharded)
    assert (result.status, result.err) == (0, "")
    assert result.lines[0] == f"{sharded}/global_step200"
    assert _row(result.lines, "step") == ["step", "200"]
    assert _row(result.lines, "world size")[-1] == "2"
    assert _row(result.lines, "ZeRO stage")[-1] == "3"
    assert _row(result.lines, "tied") == ["tied", "head.weight", "=", "embed.weight"]


def test_equal_blocks_are_one_line_with_the_ranks_that_own_them(
    sharded: Path, command: Command
) -> None:
    lines = command("inspect", sharded).lines
    row = _row(lines, "blocks.{0..2}.weight")
    assert row[1:] == ["3", "F32", "[8,", "8]", "768", "B", "Shard(0)", "0-1"]
    states = _row(lines, "blocks.{0..2}.weight/{exp_avg,exp_avg_sq}")
    assert states[1:4] == ["6", "F32", "[8,"]
    assert _row(lines, "seen")[-1] == "buffer"
    assert _row(lines, "norm.bias")[-1] == "frozen"


def test_full_shows_every_tensor_and_the_box_of_each_rank(sharded: Path, command: Command) -> None:
    lines = command("inspect", sharded, "--full").lines
    at = lines.index(next(line for line in lines if line.startswith("blocks.1.weight ")))
    assert lines[at + 1 : at + 3] == ["    rank 0: [0:4, 0:8]", "    rank 1: [4:8, 0:8]"]
    assert any(line.startswith("optim-00001-of-00002.safetensors ") for line in lines)
    assert "OBJECTS OF RANK 1" in lines


def test_replicas_share_the_files(replicated: Path, command: Command) -> None:
    row = _row(command("inspect", replicated).lines, "blocks.{0..2}.weight")
    assert row[-2:] == ["-", "0-1"]


def test_client_state_is_shown_as_it_was_given(sharded: Path, command: Command) -> None:
    lines = command("inspect", sharded).lines
    at = lines.index("client_state:")
    assert lines[at + 1 : at + 4] == [
        "  epoch: 2",
        "  losses: [0.5, nan]",
        "  mask: <tensor F32 [3], 12 B>",
    ]


def test_every_kind_of_object_is_shown_and_no_code_runs(
    pickled: Path, trace: Path, command: Command
) -> None:
    result = command("inspect", pickled / "t")
    assert result.status == 0
    assert not trace.exists()
    for line in [
        "  custom: <pickled tests.cli.checkpoints.Custom>",
        "  dtype: torch.bfloat16",
        "  device: device('cpu')",
        "  size: torch.Size([2, 3])",
        "  parameter: <tensor F32 [2], 8 B>",
        "  array: <tensor F32 [2, 2], 16 B>",
        "  ('a', 1): {nested: (1, 2)}",
    ]:
        assert line in result.lines


def test_names_and_values_cannot_write_to_the_terminal(pickled: Path, command: Command) -> None:
    result = command("inspect", pickled)
    assert "\x1b" not in result.out
    assert "\x07" not in result.out
    assert "  \\x1b[31mred: '\\x1b]0;title\\x07'" in result.lines


def test_long_containers_are_cut_and_full_shows_all(pickled: Path, command: Command) -> None:
    short, full = command("inspect", pickled).lines, command("inspect", pickled, "--full").lines
    assert "    ... and 10 more (--full shows all)" in short
    assert "    key29: 29" not in short
    assert "    key29: 29" in full
    assert any(line.startswith("  numbers: [0, 1, 2, 3, 4, 5, ...]") for line in short)
    assert f"  numbers: {list(range(100))}" in full


def test_json_holds_every_tensor_file_and_object(sharded: Path, command: Command) -> None:
    document = command("inspect", sharded, "--json").document
    assert (document["tag"], document["step"], document["problems"]) == ("global_step200", 200, [])
    assert document["tensors"]["model"]["blocks.1.weight"] == {
        "dtype": "F32",
        "shape": [8, 8],
        "nbytes": 256,
        "placements": ["S0"],
        "runs": [
            {
                "rank": 0,
                "offset": [0, 0],
                "shape": [4, 8],
                "count": 2,
                "stride": 1,
                "dim": 0,
                "step": 4,
                "last": 4,
            }
        ],
    }
    assert document["objects"]["client_state"]["epoch"] == 2
    assert document["objects"]["client_state"]["losses"] == [0.5, {"$float": "nan"}]
    assert sorted(document["rank_objects"]) == ["0"]
    path = sharded / "global_step200" / "optim-00001-of-00002.safetensors"
    assert document["files"][path.name]["nbytes"] == path.stat().st_size


def test_full_json_adds_the_chunks_and_all_ranks_objects(sharded: Path, command: Command) -> None:
    document = command("inspect", sharded, "--json", "--full").document
    assert document["tensors"]["model"]["blocks.1.weight"]["chunks"] == [
        {"file": "model-00000-of-00002.safetensors", "offset": [0, 0], "shape": [4, 8]},
        {"file": "model-00001-of-00002.safetensors", "offset": [4, 0], "shape": [4, 8]},
    ]
    assert sorted(document["rank_objects"]) == ["0", "1"]


def test_a_link_leads_to_its_tag(sharded: Path, command: Command) -> None:
    os.symlink("global_step100", sharded / "last.ckpt")
    assert _row(command("inspect", sharded / "last.ckpt").lines, "step") == ["step", "100"]


def test_a_directory_whose_latest_is_damaged_falls_back_and_says_so(
    sharded: Path, command: Command
) -> None:
    (sharded / "global_step200" / "manifest.json").unlink()
    result = command("inspect", sharded)
    assert result.lines[0] == f"{sharded}/global_step100"
    assert result.err.startswith("zero-ckpt inspect: falling back to ")
    assert result.status == 0


def test_a_damaged_tag_is_shown_as_far_as_possible(sharded: Path, command: Command) -> None:
    path = sharded / "global_step100" / "state-00000-of-00002.safetensors"
    flip(path, 100)
    result = command("inspect", sharded / "global_step100")
    assert result.status == 1
    assert "MODEL: 10 tensors" in result.out
    assert path.name in result.err
    path.unlink()
    result = command("inspect", sharded / "global_step100")
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert "(and 1 more)" in result.err
    assert command("inspect", sharded / "global_step100", "--json").document["problems"]


def test_a_damaged_manifest_is_damage(sharded: Path, command: Command) -> None:
    flip(sharded / "global_step100" / "manifest.json", 300)
    result = command("inspect", sharded / "global_step100")
    assert (result.status, result.out, result.err.count("\n")) == (1, "", 1)


def test_an_uncommitted_folder_is_called_so(sharded: Path, command: Command) -> None:
    (sharded / "global_step100" / "manifest.json").unlink()
    result = command("inspect", sharded / "global_step100")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "did not finish" in result.err
