"""`ZeroStrategy`: ZeRO stages 0 to 3 and sharded checkpoints as a Lightning strategy.

The strategy is a subclass of `DDPStrategy`, so launchers, samplers, sync-batchnorm, compilation and manual optimization
come from it. Because Lightning exists in two copies, the class is made for a copy by `make_strategy`; what it does is
in the mixins, one file for each concern.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from zero_ckpt.lightning.namespaces import load
from zero_ckpt.lightning.saving import SaveMixin
from zero_ckpt.lightning.setup import SetupMixin

__all__ = ["ZeroStrategyMixin", "make_strategy"]

RESTORED = "_CheckpointConnector.resume_end"
"""The barrier that Lightning enters when all is restored and it has dropped the checkpoint's dict."""


class ZeroStrategyMixin(SetupMixin, SaveMixin):
    """Trains with ZeRO and writes every checkpoint as a committed folder of per-rank shards.

    stage: 0 to 3, what is sharded across ranks: nothing, optimizer state, and gradients, and parameters. Default 2.
    wrap: what stages 2 and 3 gather together: "auto", module classes, or a predicate on modules.
    sharding_size: ranks that hold one copy of the model between them (stages 2 and 3); None: all of them.
    cpu_offload: keep parameters, gradients and optimizer state in host memory (stages 2 and 3).
    export: write the fp32 weights when fit ends: True (the default), False, or an `Fp32Export` that says how.
    exclude_frozen_parameters: leave weights with `requires_grad=False` out of checkpoints; a load keeps the module's
        own.
    tag_validation: what to do when ranks give different checkpoint paths: "ignore" (the default) or "warn" (rank 0's
        counts), or "fail".
    load_optimizer_states, load_lr_scheduler_states: False: a resumed fit keeps its own, not those of the checkpoint.
    load_module_only: a resumed fit takes the weights only, and begins everything else anew.
    override_hyperparameters: optimizers of a resumed fit keep its own options (learning rate, weight decay, ...) group
        by group, instead of those in the checkpoint.
    save_timeout: seconds of silence after which another rank counts as lost in a save or a load; None: 300.
    async_save: save beside the training: True, or an `AsyncSave` that says how. `wait_for_saves()` waits.
    timeout: of the process group, as in `DDPStrategy`, whose other arguments are accepted too (those of
        `DistributedDataParallel` take effect at stages 0 and 1).

    `load_report` tells which weights the last load did not match. What hooks put into a checkpoint under
    `per_rank_client_state` is stored for each rank, and there again for that rank's hooks when a checkpoint of the same
    number of ranks is loaded.

    With precision "bf16-true" or "16-true" the weights themselves are 16-bit: there are no float32 masters, and an fp32
    export is a conversion of what was trained.

    Raises `ConfigurationError` for options that do not fit each other, and TypeError for an argument that nobody knows.
    Saves and loads raise those of `zero_ckpt.errors`, the same on every rank.
    """

    strategy_name = "zero_ckpt"

    def barrier(self, name: str | None = None) -> None:
        """No barrier while an exception ends the run: other ranks may never come."""
        if self.interrupted:
            return
        if name == RESTORED:
            self.read_what_is_kept()
        super().barrier(name)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """While an exception ends the run, this rank's own object."""
        return obj if self.interrupted else super().broadcast(obj, src)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """While an exception ends the run, this rank's own decision."""
        return decision if self.interrupted else super().reduce_boolean_decision(decision, all)


@cache
def make_strategy(namespace: str) -> type[Any]:
    """The strategy class for `lightning.pytorch` or `pytorch_lightning`."""
    copy = load(namespace)
    return copy.made("ZeroStrategy", ZeroStrategyMixin, copy.ddp_strategy)
