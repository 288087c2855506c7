"""Setting up a run (the model is sharded once, then optimizers are made over what is sharded) and ending it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from zero_ckpt import zero
from zero_ckpt.core.notices import warn_user
from zero_ckpt.errors import ConfigurationError, ZeroCkptError
from zero_ckpt.lightning.copies import shard_copies
from zero_ckpt.lightning.export import attach_export, detach_export, run_export
from zero_ckpt.lightning.requeue import attach_requeue, detach_requeue
from zero_ckpt.lightning.restoring import RestoreMixin
from zero_ckpt.lightning.steps import StepMixin
from zero_ckpt.zero.copies import allow_copies
from zero_ckpt.zero.experts import expert_lists
from zero_ckpt.zero.generic import users_class
from zero_ckpt.zero.initial import materialize
from zero_ckpt.zero.inside import mesh_of_units, outermost_units, reset_passes

__all__ = ["SetupMixin"]


class SetupMixin(RestoreMixin, StepMixin):
    """Setup and teardown at every stage."""

    def setup(self, trainer: Any) -> None:
        self.agree_nothing_to_restore()
        attach_export(trainer, self.namespace, self.export)
        if self.is_fitting:
            attach_requeue(trainer, self.namespace)
        self._tell_precision()
        self._zero_shared = False
        if self.stage >= 2:
            self._setup_sharded(trainer)
        else:
            self.materialize_replicated()
            super().setup(trainer)
            assert self.lightning_module is not None
            if expert_lists(self.lightning_module):
                self.adapt_precision()
        if self.is_fitting:
            assert self.lightning_module is not None
            self.engine.warm([self.lightning_module], has_optimizer=True)
        self.is_set_up = True

    def _tell_precision(self) -> None:
        if self.is_fitting and isinstance(self.precision_plugin, self.namespace.half_precision):
            self.namespace.module("utilities.rank_zero").rank_zero_info(
                f"precision={self.precision_plugin.precision!r} keeps 16-bit weights: there are no "
                "float32 masters, and an fp32 export is a conversion of them."
            )

    def _setup_sharded(self, trainer: Any) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        model = self.model
        if self.is_fitting and self._layer_sync and not is_sharded(model):
            model = self._layer_sync.apply(model)
        self.model = self.precision_plugin.convert_module(model)
        self._shard(self.model)
        self.apply_deferred_weights()
        shard_copies(trainer.callbacks, self.model)
        if self.is_fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self.adapt_precision()

    def _shard(self, model: nn.Module) -> None:
        """Shard, unless this model already is: by an earlier run, or by its `configure_model`.

        One process alone has nothing to share: its model stays plain, and can be copied and pickled.
        """
        if self.world_size == 1 and not self.cpu_offload and not is_sharded(model):
            materialize(model, list(model.modules()), self.root_device)
            self.model_to_device()
            return
        automatic = self.lightning_module is None or self.lightning_module.automatic_optimization
        self._refuse_pruning()
        self._zero_mesh = users_mesh(model) or self._zero_mesh
        if self._zero_mesh is None:
            kind = self.root_device.type
            self._zero_mesh = zero.make_mesh(self.world_size, self.sharding_size, kind)
        self._zero_sharding = zero.shard_module(
            model,
            stage=self.stage,
            mesh=self._zero_mesh,
            wrap=self.wrap,
            mixed_precision=zero.mixed_precision_policy(str(self.precision_plugin.precision)),
            cpu_offload=self.cpu_offload,
            # Several backward passes in a step: the root's own parameters must stay whole.
            root="shard" if automatic else "replicate",
        )
        recover(model)
        zero.reshard(model)
        allow_copies(model)

    def _refuse_pruning(self) -> None:
        if self._callbacks("ModelPruning"):
            raise ConfigurationError(
                f"ModelPruning works on whole weights, and stage={self.stage} shards them. Use stage 0 or 1."
            )

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks that split one model between them (tensor parallelism) see the same data."""
        mesh = self._zero_mesh
        place = None if mesh is None else mesh.get_coordinate()
        if mesh is None or place is None or self.stage < 2:
            return super().distributed_sampler_kwargs
        rank = 0
        for coordinate, size in zip(place, mesh.shape, strict=True):
            rank = rank * size + coordinate
        return {"num_replicas": mesh.size(), "rank": rank}

    def materialize_replicated(self) -> None:
        """At stages 0 and 1, give memory and initial values to a model made on the meta device."""
        assert self.lightning_module is not None
        if is_sharded(self.lightning_module):
            raise ConfigurationError(
                f"{users_class(type(self.lightning_module)).__name__} is sharded already (by configure_model or "
                f"an earlier run), which stage={self.stage} cannot train. Use stage 2 or 3, or a "
                "fresh model."
            )
        modules = list(self.lightning_module.modules())
        materialize(self.lightning_module, modules, self.root_device)

    def setup_optimizers(self, trainer: Any) -> None:
        """Create the user's optimizers, then give each of them its share of the work."""
        self._zero_partitions.clear()
        super().setup_optimizers(trainer)
        created = list(self.optimizers)
        stage = self.stage if self.world_size > 1 else 0
        for optimizer in created:
            zero.check_optimizer(optimizer, stage)
        if stage == 1:
            self.optimizers = [self._partitioned(optimizer, optimizer) for optimizer in created]
        elif self._zero_sharding is not None:
            for optimizer in created:
                zero.rebind_optimizer(optimizer, self._zero_sharding.replaced)

    def _partitioned(self, whole: Optimizer, bound: Optimizer) -> Optimizer:
        """`whole`, partitioned at stage 1; schedulers that drove `bound` drive the parts."""
        assert self.lightning_module is not None
        parameters = {id(p) for p in self.lightning_module.parameters()}
        if not any(id(p) in parameters for group in whole.param_groups for p in group["params"]):
            return whole  # Lightning's stand-in for "no optimizer"
        parts = zero.partition_optimizer(whole)
        for config in self.lr_scheduler_configs:
            zero.rebind_scheduler(config.scheduler, bound, parts)
        self._zero_partitions[parts] = (whole, parts.param_groups)
        return parts

    def follow_regrouping(self) -> None:
        """Partition anew every optimizer whose list of groups was replaced, as a finetuning callback does on resume.

        Its parts would otherwise go on with the old groups.
        """
        optimizers = list(self.optimizers)
        for index, parts in enumerate(optimizers):
            whole, groups = self._zero_partitions.get(parts, (None, None))
            if whole is not None and groups is not parts.param_groups:
                whole.param_groups = parts.param_groups
                optimizers[index] = self._partitioned(whole, parts)
        if any(a is not b for a, b in zip(optimizers, self.optimizers, strict=True)):
            self.optimizers = optimizers

    def on_train_end(self) -> None:
        """Export after every callback and the module had their turn, when the weights are those that fit leaves."""
        super().on_train_end()
        self.wait_for_saves()
        run_export(self._current_trainer())

    def teardown(self) -> None:
        """Leaves a sharded model sharded, where it is, and one that an error has left without memory, too."""
        trainer = self._current_trainer()
        if self.interrupted:
            detach_export(trainer)
        if trainer is not None:
            detach_requeue(trainer)
        self._end_saves()
        self.close_checkpoint()
        self.is_set_up = False
        self.restore_precision()
        sharded = self.stage >= 2 and self.model is not None and is_sharded(self.model)
        if not sharded and not _is_on_meta(self.lightning_module):
            super().teardown()
            return
        if sharded and self._start_method != "popen" and not self.interrupted:
            assert self.model is not None
            gather_parameters(self.model)
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def _end_saves(self) -> None:
        """Return when every save has been committed or has failed. In an exception handler a failure is a warning."""
        if self._zero_engine is None:
            return
        try:
            self._zero_engine.close()
        except ZeroCkptError as error:
            if not self.interrupted:
                raise
            warn_user(str(error))


def _is_on_meta(model: nn.Module | None) -> bool:
    """Whether any tensor of it has no memory, and could not be moved."""
    return model is not None and any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def is_sharded(model: nn.Module) -> bool:
    """Whether any part of it is sharded, by whoever."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def recover(module: nn.Module) -> None:
    """Make a sharded model fit to run again after an exception in its forward or backward pass.

    FSDP2 would take the next pass for the rest of the interrupted one, and train on wrong
    gradients.
    """
    for unit in outermost_units(module):
        reset_passes(unit)


def users_mesh(model: nn.Module) -> DeviceMesh | None:
    """The data-parallel mesh of a model that its user has sharded or made tensor-parallel.

    With `fully_shard` that is the mesh given to it; with tensor parallelism alone, the other
    dimensions of the mesh that the tensor-parallel one was taken from.
    """
    mesh = mesh_of_units(model)
    if mesh is not None:
        return mesh
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            return _other_dimensions(parameter.device_mesh)
    return None


def _other_dimensions(mesh: DeviceMesh) -> DeviceMesh:
    whole = mesh._get_root_mesh()
    own = set(mesh.mesh_dim_names or ())
    others = tuple(name for name in whole.mesh_dim_names or () if name not in own)
    if not others or not own:
        raise ConfigurationError(
            "parameters are spread over a device mesh that has no dimension left for data "
            "parallelism. Take the tensor-parallel mesh from one with named dimensions, for "
            'example init_device_mesh("cuda", (2, 4), mesh_dim_names=("data", "tensor")).'
        )
    return whole[others]


@torch.no_grad()
def gather_parameters(model: nn.Module) -> None:
    """Make all parameters plain and whole, on the CPU. Collective. The model can then not be run.

    For launchers that start processes with `multiprocessing`: they hand the weights of rank 0's
    model back to the main process, and end.
    """
    whole: dict[Any, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in dict[str, Any](module._parameters).items():
            if isinstance(parameter, DTensor):
                if parameter not in whole:
                    value = parameter.full_tensor().cpu()
                    whole[parameter] = nn.Parameter(value, parameter.requires_grad)
                module._parameters[name] = whole[parameter]
