"""Becoming attached and detached, pickled and copied; what is refused; what goes to Accelerate's own code."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn

from tests.accelerate.harness import assert_same, batches, fsdp2, make, on_ranks, state_of, train
from zero_ckpt.accelerate import ZeroAccelerator, attach, detach
from zero_ckpt.errors import ConfigurationError, StateMismatchError


class Own(Accelerator):  # type: ignore[misc]
    def hello(self) -> str:
        return "hello"

    def save_state(self, *args: Any, **kwargs: Any) -> Any:
        return ["hello", super().save_state(*args, **kwargs)]


class OwnZero(ZeroAccelerator):
    pass


def test_attach_keeps_the_accelerator_and_its_class(tmp_path: Path) -> None:
    on_ranks(kept, 1, str(tmp_path))


def kept(out: str) -> None:
    for kind in (Accelerator, Own):
        given = kind(cpu=True)
        accelerator = attach(given)
        assert accelerator is given
        assert isinstance(accelerator, kind)
        assert type(attach(kind(cpu=True))) is type(accelerator)
        assert attach(accelerator) is accelerator
        with pytest.raises(ConfigurationError, match="attached already"):
            attach(accelerator, keep_last=2)
        assert detach(accelerator) is accelerator
        assert type(accelerator) is kind
        assert not [name for name in vars(accelerator) if name.startswith("_zero")]
        assert detach(accelerator) is accelerator
        accelerator.prepare(nn.Linear(2, 2))
        assert "tag" not in inspect.signature(Accelerator.save_state).parameters
        accelerator.save_state(out)
        assert "model.safetensors" in os.listdir(out)
    own = attach(Own(cpu=True))
    assert isinstance(own, ZeroAccelerator)
    assert own.hello() == "hello"
    own.prepare(nn.Linear(2, 2))
    assert own.save_state(out, tag="a") == ["hello", Path(out)]  # the user's override, then ours
    with pytest.raises(ConfigurationError, match="expected an Accelerator, found dict"):
        attach({})


def test_the_class_form_takes_both_kinds_of_arguments() -> None:
    on_ranks(class_form, 1)


def class_form() -> None:
    accelerator = ZeroAccelerator(cpu=True, gradient_accumulation_steps=3, keep_last=2)
    assert accelerator.gradient_accumulation_steps == 3
    assert accelerator._zero_options.keep_last == 2
    assert type(detach(accelerator)) is Accelerator
    with pytest.raises(ConfigurationError, match="cannot be detached"):
        detach(OwnZero(cpu=True))


def test_pickled_and_copied_accelerators_still_save(tmp_path: Path) -> None:
    on_ranks(pickled, 1, str(tmp_path))


def pickled(out: str) -> None:
    kinds: list[Any] = [attach(Own(cpu=True), keep_last=1), OwnZero(cpu=True, keep_last=1)]
    for number, accelerator in enumerate([attach(Accelerator(cpu=True), keep_last=1), *kinds]):
        model, optimizer = accelerator.prepare(*linear_and_adam())
        step(accelerator, model, optimizer)
        assert copy.deepcopy(accelerator) is accelerator
        back = pickle.loads(pickle.dumps(accelerator))
        assert type(back) is type(accelerator)
        assert back._zero_options == accelerator._zero_options
        step(back, back._models[0], back._optimizers[0])
        folder = f"{out}/{number}"
        back.save_state(folder)
        assert sorted(os.listdir(folder)) == ["global_step2", "latest"]
        back.load_state(folder)
        assert accelerator._zero_step == 1


def linear_and_adam() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    return model, torch.optim.AdamW(model.parameters())


def step(accelerator: Any, model: Any, optimizer: Any) -> None:
    accelerator.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    optimizer.zero_grad()


def test_options_that_cannot_work_are_refused() -> None:
    on_ranks(refused, 2)


def refused() -> None:
    accelerator = Accelerator(cpu=True)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("stage=4", {"stage": 4}),
        ("stage=True", {"stage": True}),
        ("cpu_offload and sharding_size", {"stage": 1, "cpu_offload": True}),
        ("export_format='zip'", {"export_format": "zip"}),
        ("export_format='ckpt'", {"export_format": "ckpt"}),
        ("export=None", {"export": None}),
        ("export=''", {"export": ""}),
        (r"model\.bin: a file named \*\.bin in format 'safetensors'", {"export": "out/model.bin"}),
        ("max_shard_size", {"max_shard_size": "5XB"}),
        ("max_shard_size", {"max_shard_size": 0}),
        ("keep_last", {"keep_last": 0}),
        ("keep_last", {"keep_last": 1.5}),
        ("timeout=-1", {"timeout": -1}),
        ("timeout='x'", {"timeout": "x"}),
        ("timeout=True", {"timeout": True}),
        ("tag_validation", {"tag_validation": "maybe"}),
        ("async_save='yes'", {"async_save": "yes"}),
        ("wrap='nonsense'", {"wrap": "nonsense"}),
        ("wrap=5", {"stage": 3, "wrap": 5}),
        (r"subclasses of torch\.nn\.Module", {"stage": 3, "wrap": [int]}),
        ("sharding_size=0", {"stage": 2, "sharding_size": 0}),
    ]
    for text, options in wrong:
        with pytest.raises(ConfigurationError, match=text):
            attach(accelerator, **options)
    assert type(accelerator) is Accelerator
    late = Accelerator(cpu=True)
    late.prepare(nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match=r"Attach before accelerator\.prepare"):
        attach(late, 2)
    assert type(late) is Accelerator
    with pytest.raises(ConfigurationError, match="LBFGS cannot be sharded"):
        attach(Accelerator(cpu=True), 1).prepare(torch.optim.LBFGS(nn.Linear(2, 2).parameters()))
    with pytest.raises(ConfigurationError, match="stage=2, but this accelerator trains with FSDP"):
        attach(fsdp2(), 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is found without cpu=True")
def test_an_accelerator_that_takes_a_launched_process_for_the_only_one_is_refused() -> None:
    on_ranks(taken_for_the_only_one, 2)


def taken_for_the_only_one() -> None:
    for stage in (None, 2):
        accelerator = Accelerator()  # on a machine without GPUs
        assert accelerator.num_processes == 1
        with pytest.raises(ConfigurationError, match=r"2 were started.*Accelerator\(cpu=True\)"):
            attach(accelerator, stage)
        assert type(accelerator) is Accelerator


def test_what_a_save_would_silently_leave_out_is_told(tmp_path: Path) -> None:
    on_ranks(left_out, 2, str(tmp_path))


def left_out(out: str) -> None:
    accelerator: Any = attach(Accelerator(cpu=True), 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accelerator.save_state(out, tag="early")
    told = [str(warning.message) for warning in caught]
    assert len(told) == (1 if accelerator.is_main_process else 0)
    for text in told:
        assert text.startswith(f"{out}/early holds no weights and no optimizer")
    accelerator.prepare(nn.Linear(2, 2))
    for wrong in ({"epoch": 3}, "global_step5"):
        with pytest.raises(ConfigurationError, match="Give client_state and tag by name"):
            accelerator.save_state(out, wrong)
    with pytest.raises(ConfigurationError, match=r"as output_dir\. Give client_state by name"):
        accelerator.save_state({"epoch": 3})  # automatic naming would not look at it
    assert sorted(os.listdir(out)) == ["early", "latest"]
    accelerator.save_state(out, tag="prepared")
    with pytest.raises(StateMismatchError, match=r"Call load_state after prepare\(\)\.$"):
        attach(Accelerator(cpu=True), 2).load_state(out)


def test_attached_after_prepare_saves_what_is_prepared(tmp_path: Path) -> None:
    on_ranks(late, 2, str(tmp_path))


def late(out: str) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*linear_and_adam())
    attach(accelerator)
    step(accelerator, model, optimizer)
    accelerator.save_state(out)
    assert sorted(os.listdir(out)) == ["global_step1", "latest"]


def test_free_memory_begins_a_new_run(tmp_path: Path) -> None:
    on_ranks(freed, 2, str(tmp_path))


def freed(out: str) -> None:
    made = make(3)
    train(made, batches(2))
    made[0].free_memory()
    again = (made[0], *made[0].prepare(*made[1:]))  # as find_executable_batch_size does
    assert again == made
    assert not made[0].save_model(made[1], f"{out}/model")
    train(made, batches(1))
    made[0].save_state(out)
    assert sorted(os.listdir(out)) == ["global_step1", "latest", "model"]
    made[0].free_memory()
    made[0].prepare(*linear_and_adam())
    made[0].save_state(out)
    assert "global_step0" in os.listdir(out)


@pytest.mark.parametrize("stage", [None, 1])
def test_a_folder_that_accelerate_wrote_loads(stage: int | None, tmp_path: Path) -> None:
    for before, after, count in on_ranks(foreign, 2, str(tmp_path), stage):
        assert_same(before, after)
        assert count == 3


def foreign(out: str, stage: int | None) -> tuple[Any, Any, int]:
    made = make()
    train(made, batches(3))
    before = state_of(made)
    detach(made[0]).save_state(out)
    PartialState().wait_for_everyone()
    other = make(stage, seed=4)
    other[0].load_state(out)
    return before, state_of(other), other[0]._zero_step


def test_other_kinds_of_training_are_left_to_accelerate(tmp_path: Path) -> None:
    on_ranks(left_alone, 1, str(tmp_path))


def left_alone(out: str) -> None:
    accelerator: Any = attach(Accelerator(cpu=True))
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    calls: list[Any] = []
    # Stand for Accelerate's own code under an engine that this machine does not have.
    original: Any = Accelerator
    original.save_state = lambda self, *args, **kwargs: (
        calls.append((args, kwargs)) or Path("saved")
    )
    original.load_state = lambda self, *args, **kwargs: calls.append((args, kwargs))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert accelerator.save_state(out, client_state={"a": 1}, exclude=2) == Path("saved")
        accelerator.load_state(out, None, strict=False)
    assert [str(each.message) for each in told] == [
        "under DEEPSPEED zero_ckpt leaves saving and loading to Accelerate's own code"
    ]
    assert calls == [
        ((out, True), {"exclude": 2, "client_state": {"a": 1}}),
        ((out, None), {"strict": False}),
    ]
    with pytest.raises(ConfigurationError, match="has no tags"):
        accelerator.save_state(out, tag="a")
    assert not os.listdir(out)


def test_what_accelerates_fsdp_wrote_loads(tmp_path: Path) -> None:
    for before, after in on_ranks(foreign_fsdp, 2, str(tmp_path)):
        assert_same(before, after)


def foreign_fsdp(out: str) -> tuple[Any, Any]:
    made = make("fsdp2")
    train(made, batches(2))
    before = state_of(made)
    detach(made[0]).save_state(out)
    PartialState().wait_for_everyone()
    assert "pytorch_model_fsdp_0" in os.listdir(out)
    attach(made[0])
    train(made, batches(1))
    made[0].load_state(out)
    after = state_of(made)
    for each in (before, after):  # Accelerate takes each buffer from any rank
        each["weights"] = {k: v for k, v in each["weights"].items() if not k.startswith("norm.r")}
    return before, after
