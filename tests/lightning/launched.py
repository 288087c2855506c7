"""A program of a user whose strategy starts the ranks: `python -m tests.lightning.launched fork folder`.

In a process of its own, since a fork copies what all other tests have left in theirs, and since ranks that hang are
ended with it.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch

from tests.lightning.harness import Model, loader
from zero_ckpt.core.checkpoint import open_checkpoint
from zero_ckpt.lightning import ZeroStrategy


def main(method: str, root: Path) -> None:
    """Train on 2 ranks; the weights are those of the checkpoint afterwards, as plain tensors in this process."""
    model = Model()
    run = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ZeroStrategy(stage=3, start_method=method, export=False),
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(root),
        callbacks=[L.callbacks.ModelCheckpoint(dirpath=root / "c", filename="a")],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(model, loader())
    assert run.checkpoint_callback is not None
    assert run.checkpoint_callback.best_model_path == str(root / "c" / "a.ckpt")
    with open_checkpoint(root / "c") as checkpoint:
        assert checkpoint.manifest.world_size == 2
        for key, value in model.state_dict().items():
            assert type(value) is torch.Tensor
            assert torch.equal(value, checkpoint.tensor("model", key)), key
    print("the weights are back")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
