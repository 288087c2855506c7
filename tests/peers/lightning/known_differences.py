"""Lightning's tests that pass with its own strategies and must differ with `ZeroStrategy`, and why.

An id without brackets stands for all parameters of that test.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KNOWN", "Difference", "difference_of"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One reason, and the tests that it explains."""

    reason: str
    tests: tuple[str, ...]


KNOWN = (
    Difference(
        "The test downloads the checkpoint from a web server, as one file; ours is a folder.",
        (
            "models/test_restore.py::test_strict_model_load_more_params[True]",
            "models/test_restore.py::test_strict_model_load_less_params[True]",
            "trainer/test_trainer.py::test_no_val_module[True]",
            "trainer/test_trainer.py::test_strict_model_load[True]",
            "trainer/test_trainer.py::test_fit_ckpt_path_epoch_restored[True]",
        ),
    ),
    Difference(
        "The test looks for Lightning's own words; ours is a FileNotFoundError, too, and says what "
        "the directory has instead.",
        ("models/test_restore.py::test_try_resume_from_non_existing_checkpoint",),
    ),
    Difference(
        "The test counts calls of torch.save in processes that it spawns; we never call it.",
        (
            "checkpointing/test_model_checkpoint.py::test_model_checkpoint_no_extraneous_invocations",
        ),
    ),
    Difference(
        "The test passes storage_options for TorchCheckpointIO; without such a plugin they are "
        "refused, because nothing would use them.",
        ("checkpointing/test_trainer_checkpoint.py::test_trainer_save_checkpoint_storage_options",),
    ),
    Difference(
        "The test pickles the whole module after fit; PyTorch's FSDP2 modules cannot be pickled, "
        "their state_dict() can.",
        ("checkpointing/test_torch_saving.py::test_model_torch_save",),
    ),
    Difference(
        "The test expects Lightning's own TorchCheckpointIO inside an empty wrapper; we put "
        "ZeroCheckpointIO there.",
        ("plugins/test_checkpoint_io_plugin.py::test_multi_wrapped_checkpoint_io_initialization",),
    ),
    Difference(
        "The test expects a warning that the data loader cannot continue within an epoch; with "
        "ours it continues at the right batch.",
        (
            "models/test_restore.py::test_restarting_mid_epoch_raises_warning[ExceptionModel-True]",
            "models/test_restore.py::test_restarting_mid_epoch_raises_warning[ShouldStopModel-True]",
        ),
    ),
    Difference(
        "The test expects that a live training loader has no state; ours knows its place in the "
        "epoch (in checkpoints it is stored per rank, not in this dict).",
        ("loops/test_loops.py::test_loop_state_on_exception",),
    ),
    Difference(
        "The test compares optimizer states in the checkpoint with optimizer.state_dict() key by "
        "key; in ours parameters have their names, so that another sharding can load them.",
        ("models/test_restore.py::test_trainer_properties_restore_ckpt_path",),
    ),
    Difference(
        "The test deep-copies callbacks, and through the progress bar the trainer and its model; "
        "PyTorch's FSDP2 modules refuse to be copied.",
        ("models/test_restore.py::test_callbacks_state_fit_ckpt_path",),
    ),
    Difference(
        "Fails with plain DDP on one process too: Lightning makes new data loaders for a "
        "distributed sampler, and the test watches the one that it made.",
        ("loops/test_loops.py::test_workers_are_shutdown",),
    ),
    Difference(
        "Fails with plain DDP on one process too: the test expects two processes of every "
        "distributed strategy.",
        ("trainer/test_trainer.py::test_trainer_predict_cpu",),
    ),
    Difference(
        "Fails with plain DDP too: the distributed sampler draws another order of the data, with "
        "which the learning rate search ends early.",
        ("tuner/test_lr_finder.py::test_exponential_vs_linear_mode_gradient_difference",),
    ),
    Difference(
        "Fails with plain DDP too: the test fakes a part of a SLURM job, and a distributed "
        "strategy asks for the rest (SLURM_NODEID).",
        ("trainer/connectors/test_checkpoint_connector.py::test_hpc_restore_attempt",),
    ),
    Difference(
        "Fails with plain DDP too: the test sets strategy.world_size, which distributed strategies "
        "compute.",
        ("loops/optimization/test_automatic_loop.py::test_skip_training_step_not_allowed",),
    ),
    Difference(
        "Fails with plain DDP too: the test is about SingleDeviceStrategy, or replaces a method "
        "of the base class that DDPStrategy overrides.",
        (
            "trainer/test_trainer.py::test_trainer_config_strategy[trainer_kwargs0-SingleDeviceStrategy-CPUAccelerator-1]",
            "trainer/test_trainer.py::test_trainer_calls_strategy_on_exception",
        ),
    ),
)


def difference_of(test: str) -> Difference | None:
    """Why `test` may fail; None: it may not."""
    names = {test, test.partition("[")[0]}
    return next((each for each in KNOWN if names & set(each.tests)), None)
