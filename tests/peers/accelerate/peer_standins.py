"""Local stand-ins for what Accelerate's checkpointing scripts fetch from the hub.

Owns: a folder to run them in. `tests` and `examples` there are links into the source tree, and
`bert-base-cased` is a tiny random BERT with a vocabulary from the tree's sample of MRPC, which
`from_pretrained("bert-base-cased")` prefers to the hub's. The metric is in `standins`. Nothing is
fetched, and nothing in the source tree is changed.
"""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

__all__ = ["make_folder", "missing"]

NAME = "bert-base-cased"
SAMPLES = Path("tests") / "test_samples" / "MRPC"
LONGEST = 128
"""Tokens of a pair of sentences; more are cut."""

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def missing(source: Path) -> str | None:
    """Why the scripts cannot be run, or None."""
    for part in (SAMPLES, Path("examples") / "by_feature"):
        if not (source / part).is_dir():
            return f"{source} has no {part.as_posix()}, which is only in the repository"
    for package in ("datasets", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"package {package} is not installed"
    return None


def make_folder(folder: Path, source: Path) -> None:
    """Make the links and the model in `folder`, which is there and empty."""
    for part in ("tests", "examples"):
        (folder / part).symlink_to(source / part, target_is_directory=True)
    scripts = Path(__file__).with_name("peer_scripts.py")  # a link: our own conftest is not its
    (folder / scripts.name).symlink_to(scripts)
    words = vocabulary(source / SAMPLES)
    model = folder / NAME
    model.mkdir()
    (model / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    write_model(model, len(words))


def vocabulary(samples: Path) -> list[str]:
    """A WordPiece vocabulary: the sample's words, and every character alone and as a continuation."""
    words: set[str] = set()
    for file in sorted(samples.glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as rows:
            for row in csv.DictReader(rows):
                words.update(row["sentence1"].split(), row["sentence2"].split())
    characters = {character for word in words for character in word}
    continued = {f"##{character}" for character in characters}
    return [*_SPECIAL, *sorted(words | characters | continued)]


def write_model(folder: Path, tokens: int) -> None:
    """A BERT of two layers with weights from a fixed seed, and its tokenizer's vocab.txt settings."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=tokens, intermediate_size=64, max_position_embeddings=LONGEST, **sizes
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer = BertTokenizer.from_pretrained(
        str(folder), do_lower_case=False, model_max_length=LONGEST
    )
    tokenizer.save_pretrained(folder)
