"""The documentation tells the truth: its code runs, its links lead somewhere, its error texts exist.

In README.md and docs/guides/ a comment before a code block says how it is run:

    <!-- run -->            by one process           <!-- run: ranks=2 -->    by two ranks of one job

Blocks of a page run in their order, in one folder. Python blocks that follow each other and run in the same way are
one program. Two kinds of comments hold Python that readers need not see: `<!-- hidden` or `<!-- hidden: ranks=2` runs
in its place, and `<!-- setup` is put before every program of the page.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import warnings
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest

from tests.workers import run_ranks
from zero_ckpt.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs" / "guides").glob("*.md")])
ALL_PAGES = sorted(
    p for p in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")]
)

BLOCK = re.compile(
    r"^<!-- (?P<where>setup|hidden|run)(?:: ranks=(?P<ranks>\d+))?"
    r"(?:\n(?P<hidden>.*?)^-->| -->\n```(?P<language>\w+)\n(?P<code>.*?)^```)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block that runs: `language` is python or sh; `ranks` 0 means one process without a group."""

    language: str
    ranks: int
    code: str


def programs_of(text: str) -> list[Block]:
    """What to run, in order."""
    setup, blocks = "", []
    for match in BLOCK.finditer(text):
        code = match["code"] or match["hidden"]
        if match["where"] == "setup":
            setup += code
        else:
            blocks.append(Block(match["language"] or "python", int(match["ranks"] or 0), code))
    programs = []
    for (language, ranks), group in groupby(blocks, lambda block: (block.language, block.ranks)):
        code = "".join(block.code for block in group)
        programs.append(Block(language, ranks, setup * (language == "python") + code))
    return programs


def run_python(code: str, folder: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(folder)
    warnings.filterwarnings("ignore", module=r"(lightning|torch)(\.|$)")
    warnings.filterwarnings(
        "ignore", message="[^:]* was saved by . ranks? and is"
    )  # as the guides say
    exec(compile(code, "<documentation>", "exec"), {"__name__": "documentation"})


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = programs_of(page.read_text())
    assert programs
    for program in programs:
        if program.language == "python":
            # One process is a rank too, so that what it changes in its process stays there.
            job = run_python if program.ranks else run_alone
            run_ranks(job, program.ranks or 1, program.code, str(tmp_path))
        else:
            monkeypatch.chdir(tmp_path)
            run_commands(program.code)


def run_alone(code: str, folder: str) -> None:
    import torch.distributed as dist

    dist.destroy_process_group()
    run_python(code, folder)


def run_commands(code: str) -> None:
    """Lines of `zero-ckpt ...`, in this process: an interpreter and torch for each would take most of the time."""
    for line in code.splitlines():
        command, *arguments = shlex.split(line, comments=True)
        assert command == "zero-ckpt"
        assert main(arguments) == 0, line


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            assert heading in anchors(file.read_text()), f"{page.name}: {target}"


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_objects_exist(page: Path) -> None:
    for name in set(re.findall(r"`(zero_ckpt(?:\.\w+)+)", page.read_text())):
        module, attributes = importlib.import_module("zero_ckpt"), name.split(".")[1:]
        value: object = module
        for depth, attribute in enumerate(attributes, start=1):
            if not hasattr(value, attribute):
                importlib.import_module(".".join(["zero_ckpt", *attributes[:depth]]))
            value = getattr(value, attribute)


def test_every_quoted_error_is_one_that_the_code_raises() -> None:
    page = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^> (.+)$", page, re.MULTILINE)
    assert len(quoted) > 15
    told = "\0".join(source_texts())
    for line in quoted:
        parts = [part.strip(" .:(") for part in line.split("...")]
        assert max(map(len, parts)) > 8, line
        for part in parts:
            assert part in told, f"no such message: {part!r}"


def source_texts() -> list[str]:
    """All text in the package's string literals, cut at what is filled in."""
    texts = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                texts.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_every_exception_is_in_the_troubleshooting_guide() -> None:
    errors = importlib.import_module("zero_ckpt.errors")
    page = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text()
    missing = [name for name in errors.__all__ if not re.search(rf"\b{name}`", page)]
    assert not missing


def test_the_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = {path.stem for path in (ROOT / "src").rglob("*.py")} - {"__init__", "__main__"}
    named = set(re.findall(r"`(\w+)`", text)) | set(
        re.findall(r"^  (\w+)\.py ", text, re.MULTILINE)
    )
    assert not modules - named
