from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import zero_ckpt
from zero_ckpt.cli import main

COMMANDS = ["ls", "inspect", "verify", "repair", "export", "convert"]

RUN = [sys.executable, "-m", "zero_ckpt"]


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"zero-ckpt {zero_ckpt.__version__}\n"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_gives_examples_and_fits_a_terminal(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"] if command else ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"examples:\n  zero-ckpt {command}" in text
    assert max(map(len, text.splitlines())) <= 120
    assert command or all(name in text for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["ls"], ["verify", "a", "b"], ["repair", ""], ["export", "a", ""]]
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().out == ""


def test_ls_inspect_and_verify_do_not_import_torch(sharded: Path) -> None:
    """What makes them start in well under 0.5 s."""
    script = f"""
import sys
from zero_ckpt.cli import main
for arguments in (["ls"], ["inspect"], ["inspect", "--full"], ["verify"], ["inspect", "--json"]):
    assert main([*arguments, {str(sharded)!r}]) == 0, arguments
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_ls_does_not_import_numpy(sharded: Path) -> None:
    script = f"""
import sys
from zero_ckpt.cli import main
main(["ls", {str(sharded)!r}])
sys.exit("numpy" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_without_a_command_it_tells_which_there_are() -> None:
    done = subprocess.run(RUN, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    for command in ("ls", "inspect", "verify", "repair", "export", "convert"):
        assert f"\n    {command} " in done.stderr


def test_the_module_is_the_command(sharded: Path) -> None:
    done = subprocess.run([*RUN, "ls", sharded], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "global_step200" in done.stdout
    done = subprocess.run([*RUN, "ls", sharded / "no"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_ends_it_quietly(sharded: Path) -> None:
    process = subprocess.Popen(
        [*RUN, "inspect", sharded, "--full"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert errors == b""
    process.stderr.close()


def test_a_name_that_the_terminal_cannot_show_is_escaped(sharded: Path) -> None:
    os.rename(sharded / "global_step100", sharded / "größe")
    done = subprocess.run(
        [*RUN, "ls", sharded],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"gr\\xf6\\xdfe" in done.stdout


def test_no_output_but_results_when_not_on_a_terminal(sharded: Path) -> None:
    done = subprocess.run([*RUN, "verify", sharded], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
