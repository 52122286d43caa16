"""What the vLLM plugin registers, with stand-ins for vLLM; scripts/test_vllm.sh runs it in the real one."""

import importlib
import importlib.util
import logging
import os
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from vit_encoder.integrations import vllm as integration
from vit_encoder.integrations.vllm import plugin, register

PACKAGE = integration.__name__


class FakeVllm:
    """The parts of vLLM that `register` touches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: tuple[int | str, ...]) -> None:
        self.models: dict[str, str] = {}
        self.environment_variables: dict[str, Any] = {}
        self.followed_by: set[str] = set()
        self.swapped_in: list[str] = []
        self.others: str | None = None
        text = ".".join(map(str, version))
        modules: dict[str, dict[str, Any]] = {
            "vllm": {"ModelRegistry": self, "envs": self},
            "vllm.version": {"__version__": text, "__version_tuple__": version},
            "vllm.logger": {"init_logger": logging.getLogger},
            # What each of these does is tested on the real vLLM.
            f"{PACKAGE}.attention": {"swap_in": self.swap_in},
            f"{PACKAGE}.loading": {
                "follow_loading": self.followed_by.add,
                "need_no_gradients": "need_no_gradients",
                "tell_whose_attention": "tell_whose_attention",
            },
        }
        for name, attributes in modules.items():
            module = ModuleType(name)
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, name, module)
            if name.startswith(PACKAGE):
                monkeypatch.setattr(integration, name.rpartition(".")[2], module, raising=False)

    def swap_in(self) -> str | None:
        self.swapped_in.append("attention")
        return self.others

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
    assert message == (
        "vit_kernels is installed and off; one of VIT_KERNELS_VLLM=attention, VIT_KERNELS_VLLM=kernels, "
        "VIT_KERNELS_VLLM=encoder turns it on"
    )
    assert (vllm.followed_by, vllm.swapped_in) == (set(), [])


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
    assert (
        "INFO VIT_KERNELS_VLLM=kernels: the attention of every vision encoder, and Llama 4's" in capfd.readouterr().err
    )


SWAPPED = {
    "attention": {},
    "kernels": {"Llama4ForConditionalGeneration": f"{PACKAGE}.llama4_ops:Llama4ForConditionalGeneration"},
    "encoder": {
        "Llama4ForConditionalGeneration": f"{PACKAGE}.llama4_encoder:Llama4ForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration": f"{PACKAGE}.qwen2_5_vl_encoder:Qwen2_5_VLForConditionalGeneration",
    },
}


@pytest.mark.parametrize("mode", SWAPPED)
def test_a_mode_swaps_its_parts_and_says_so_once_however_often_it_is_called(
    vllm: FakeVllm, mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(plugin.VARIABLE, mode)
    with caplog.at_level("INFO"):
        register()
        register()
    assert vllm.models == SWAPPED[mode]
    assert vllm.followed_by == {"need_no_gradients"} | ({"tell_whose_attention"} if mode != "encoder" else set())
    assert set(vllm.swapped_in) == ({"attention"} if mode != "encoder" else set())
    (message,) = caplog.messages
    assert message.startswith(f"VIT_KERNELS_VLLM={mode}: the ")
    assert message.endswith(" comes from vit_kernels")


@pytest.mark.parametrize("mode", SWAPPED)
def test_each_mode_names_classes_that_are_there(mode: str) -> None:
    for where in SWAPPED[mode].values():
        module, _, name = where.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        assert f"class {name}(" in Path(spec.origin).read_text(encoding="utf-8")


def test_another_plugins_attention_is_warned_of_once(
    vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vllm.others = "ascend.Attention"
    monkeypatch.setenv(plugin.VARIABLE, "attention")
    for _ in range(3):
        register()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "VIT_KERNELS_VLLM=attention: attention stays that of ascend.Attention, which another plugin put there before"
    )


def test_caches_know_the_variant_and_the_code_of_the_ops(vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for sources in ("one", "other"):
        monkeypatch.setattr(plugin, "_sources_hash", lambda sources=sources: sources)
        for mode in SWAPPED:
            monkeypatch.setenv(plugin.VARIABLE, mode)
            register()
            keys.add(vllm.environment_variables[plugin.VARIABLE]())
    assert len(keys) == 2 * len(SWAPPED)


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
    assert (vllm.models, vllm.environment_variables, vllm.followed_by, vllm.swapped_in) == ({}, {}, set(), [])
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    expected = f"got vLLM {'.'.join(map(str, version))}, expected 0.32, 0.33; vLLM runs unchanged"
    assert expected in record.getMessage()


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "kernel")
    with pytest.raises(ValueError, match="VIT_KERNELS_VLLM: got 'kernel', expected off, attention, kernels, encoder"):
        register()


def test_the_project_declares_the_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["vit_kernels"].partition(":")
    assert getattr(importlib.import_module(module), function) is register
