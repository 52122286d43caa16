"""What the vLLM plugin registers, with stand-ins for vLLM; scripts/test_vllm.sh runs it in the real one."""

import importlib
import logging
import os
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from vit_encoder.integrations.vllm import plugin, register


class FakeVllm:
    """The parts of vLLM that `register` touches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: tuple[int | str, ...]) -> None:
        self.models: dict[str, str] = {}
        self.environment_variables: dict[str, Any] = {}
        text = ".".join(map(str, version))
        modules: dict[str, dict[str, Any]] = {
            "vllm": {"ModelRegistry": self, "envs": self},
            "vllm.version": {"__version__": text, "__version_tuple__": version},
            "vllm.logger": {"init_logger": logging.getLogger},
        }
        for name, attributes in modules.items():
            module = ModuleType(name)
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, name, module)

    def register_model(self, architecture: str, where: str) -> None:
        self.models[architecture] = where


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was said yet, and no variable chooses."""
    monkeypatch.setenv(plugin.SAID, "")
    monkeypatch.delenv(plugin.VARIABLE, raising=False)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    return FakeVllm(monkeypatch, (0, 32, 0))


@pytest.mark.parametrize("value", [None, "off"])
def test_off_changes_nothing_and_one_line_says_how_to_turn_it_on(
    vllm: FakeVllm, value: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if value is not None:
        monkeypatch.setenv(plugin.VARIABLE, value)
    with caplog.at_level("INFO"):
        register()
        register()
    assert (vllm.models, vllm.environment_variables) == ({}, {})
    (message,) = caplog.messages
    assert "VIT_KERNELS_VLLM=kernels or VIT_KERNELS_VLLM=encoder turns it on" in message


@pytest.mark.parametrize(("level", "told"), [(None, 1), ("debug", 1), ("WARNING", 0)])
def test_the_line_is_seen_before_vllm_sets_up_its_log_and_in_no_process_that_is_started(
    vllm: FakeVllm, level: str | None, told: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("vllm.plugins.vit_kernels")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    if level is not None:
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", level)
    register()
    assert capfd.readouterr().err.count("VIT_KERNELS_VLLM=encoder turns it on") == told
    environ = os.environ | {"VLLM_LOGGING_LEVEL": "INFO"}
    monkeypatch.setattr(os, "environ", environ)
    register()
    assert capfd.readouterr().err == ""
    environ[plugin.VARIABLE] = "kernels"
    register()
    assert "INFO VIT_KERNELS_VLLM=kernels: the vision part of" in capfd.readouterr().err


@pytest.mark.parametrize("mode", ["kernels", "encoder"])
def test_a_mode_registers_its_models_once_however_often_it_is_called(
    vllm: FakeVllm, mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(plugin.VARIABLE, mode)
    with caplog.at_level("INFO"):
        register()
        registered = dict(vllm.models)
        register()
    names = {"kernels": ["Llama4", "Qwen2_5_VL"], "encoder": ["Llama4"]}[mode]
    expected = {f"{name}ForConditionalGeneration" for name in names}
    assert vllm.models == {name: f"vit_encoder.integrations.vllm.{mode}:{name}" for name in expected}
    assert vllm.models == registered
    assert len(caplog.messages) == 1


def test_caches_know_the_variant_and_the_code_of_the_ops(vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for sources in ("one", "other"):
        monkeypatch.setattr(plugin, "_sources_hash", lambda sources=sources: sources)
        for mode in ("kernels", "encoder"):
            monkeypatch.setenv(plugin.VARIABLE, mode)
            register()
            keys.add(vllm.environment_variables[plugin.VARIABLE]())
    assert len(keys) == 4


def test_the_hash_of_the_sources_sees_a_changed_file(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin._sources_hash.cache_clear()
    before = plugin._sources_hash()
    read = plugin.Path.read_bytes
    monkeypatch.setattr(
        plugin.Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "varlen_attention.py")
    )
    plugin._sources_hash.cache_clear()
    assert plugin._sources_hash() != before
    plugin._sources_hash.cache_clear()


@pytest.mark.parametrize("version", [(0, 31, 2), (0, 34, 0), (1, 0, 0), (0, 0, "dev")])
def test_an_unknown_version_is_left_alone_with_one_warning(
    version: tuple[int | str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vllm = FakeVllm(monkeypatch, version)
    monkeypatch.setenv(plugin.VARIABLE, "encoder")
    register()
    register()
    assert (vllm.models, vllm.environment_variables) == ({}, {})
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    expected = f"got vLLM {'.'.join(map(str, version))}, expected 0.32, 0.33; vLLM runs unchanged"
    assert expected in record.getMessage()


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "kernel")
    with pytest.raises(ValueError, match="VIT_KERNELS_VLLM: got 'kernel', expected off, kernels, encoder"):
        register()


def test_the_project_declares_the_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["vit_kernels"].partition(":")
    assert getattr(importlib.import_module(module), function) is register
