"""What `import zero_ckpt` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import zero_ckpt

PUBLIC = {
    "AsyncSave",
    "Checkpointer",
    "LoadResult",
    "SaveHandle",
    "__version__",
    "export_fp32",
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
}

FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "accelerate")


def imported_with(*modules: str) -> set[str]:
    """Names of all modules that a new process has after importing these."""
    code = f"import sys, {', '.join(modules)}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_all_is_exactly_the_public_names() -> None:
    assert set(zero_ckpt.__all__) == PUBLIC
    assert len(zero_ckpt.__all__) == len(PUBLIC)
    assert set(dir(zero_ckpt)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(zero_ckpt, name)
    assert isinstance(value, str) if name == "__version__" else value.__doc__


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        zero_ckpt.no_such_name  # noqa: B018


def test_packages_are_there_without_a_line_of_their_own() -> None:
    """`except zero_ckpt.errors.SaveError` is what people write after `import zero_ckpt`."""
    code = """if True:
        import sys, zero_ckpt
        zero_ckpt.errors.SaveError, zero_ckpt.interop
        assert "torch" not in sys.modules
        zero_ckpt.fp32.export_fp32, zero_ckpt.zero.make_mesh, zero_ckpt.testing
        assert not {"accelerate", "lightning"} & sys.modules.keys()
        zero_ckpt.accelerate.attach, zero_ckpt.lightning.ZeroStrategy
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_framework_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zero_ckpt.lightning.installed", lambda: ())
    with pytest.raises(ImportError, match=r"lightning\.ZeroStrategy needs lightning, which is not"):
        from zero_ckpt.lightning import ZeroStrategy  # noqa: F401


def test_import_costs_neither_torch_nor_a_framework() -> None:
    modules = imported_with(
        "zero_ckpt",
        "zero_ckpt.errors",
        "zero_ckpt.cli",
        *(
            f"zero_ckpt.core.{name}"
            for name in ("chunks", "manifest", "planner", "shard_file", "storage", "tags")
        ),
    )
    assert not modules & set(FRAMEWORKS)


def test_using_the_core_imports_no_framework() -> None:
    modules = imported_with("zero_ckpt.checkpointer", "zero_ckpt.fp32", "zero_ckpt.zero")
    assert not modules & set(FRAMEWORKS[1:])
