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
        "The test counts a run's callbacks; the export at its end is one, until it is over.",
        ("models/test_restore.py::test_callbacks_state_fit_ckpt_path",),
    ),
    Difference(
        "The test prunes weights on two processes; ModelPruning works on whole weights, and is "
        "refused at stages that shard them.",
        ("callbacks/test_pruning.py::test_pruning_callback_ddp_cpu",),
    ),
    Difference(
        "Fails with plain DDP on one process too: Lightning makes new data loaders for a "
        "distributed sampler, and the test watches the one, or the sampler, that it made.",
        (
            "loops/test_loops.py::test_workers_are_shutdown",
            "trainer/flags/test_overfit_batches.py::test_overfit_batches_raises_warning_in_case_of_sequential_sampler",
            "trainer/flags/test_overfit_batches.py::test_overfit_batch_limits_eval[0.11-test-test]",
            "trainer/flags/test_overfit_batches.py::test_overfit_batch_limits_eval[4-test-test]",
            "trainer/test_dataloaders.py::test_train_dataloader_passed_to_fit",
            "trainer/test_dataloaders.py::test_mixing_of_dataloader_options",
            "trainer/test_dataloaders.py::test_multiple_dataloaders_with_random_sampler_overfit_batches",
        ),
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
        (
            "trainer/connectors/test_checkpoint_connector.py::test_hpc_restore_attempt",
            "trainer/connectors/test_signal_connector.py::test_signal_handlers_restored_in_teardown",
            "trainer/connectors/test_signal_connector.py::test_auto_requeue_custom_signal_flag",
            "trainer/connectors/test_signal_connector.py::test_auto_requeue_job",
            "trainer/connectors/test_signal_connector.py::test_auto_requeue_array_job",
            "trainer/connectors/test_signal_connector.py::test_auto_requeue_invalid_job_id",
        ),
    ),
    Difference(
        "Fails with plain DDP too: it starts processes, which Lightning refuses to do from an "
        "interactive session.",
        ("trainer/connectors/test_accelerator_connector.py::test_connector_auto_selection[True]",),
    ),
    Difference(
        "Fails with plain DDP too: with a gloo process group Lightning evaluates under no_grad "
        "where it would take inference_mode.",
        ("trainer/flags/test_inference_mode.py::test_eval_inference_mode",),
    ),
    Difference(
        "Fails with plain DDP too: Lightning tunes the batch size with no distributed strategy.",
        ("trainer/flags/test_fast_dev_run.py::test_skip_on_fast_dev_run_tuner",),
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
            "trainer/connectors/test_accelerator_connector.py::test_accelerator_cpu_with_devices[1-SingleDeviceStrategy]",
            "trainer/connectors/test_accelerator_connector.py::test_connector_auto_selection[False]",
        ),
    ),
)


def difference_of(test: str) -> Difference | None:
    """Why `test` may fail; None: it may not."""
    names = {test, test.partition("[")[0]}
    return next((each for each in KNOWN if names & set(each.tests)), None)
