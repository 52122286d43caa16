"""scripts/test_peers.sh and tests/peers, without the peers: no download, and none of their suites."""

import functools
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.peers.__main__ import _problems, arguments
from tests.peers.comparison import Allowed, Outcomes, compare, read_allowed
from tests.peers.distributions import DownloadError, source_distribution
from tests.peers.flash_attn_shim import flash_attn_varlen_func
from tests.peers.suites import SUITES, lacking, selector
from tests.peers.table import record, write_results

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "tests/peers"

PASSED = {"outcome": "passed", "message": ""}
REFUSED = {"outcome": "failed", "message": "ValueError: dropout: got 0.1, expected 0"}
WRONG = {"outcome": "failed", "message": "AssertionError: 1.0 != 2.0"}
DROPOUT = Allowed("a suite", ("*::test_dropout*",), "dropout: got", "there is no dropout")


def test_help_sets_nothing_up(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    command = [str(tmp_path / "scripts/test_peers.sh"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert all(suite in shown.stdout for suite in SUITES)
    assert all(option in shown.stdout for option in ("--transformers", "--vllm", "--flash-attn", "--only", "--out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scripts"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        (["--vllm", "no/such/folder"], "--vllm: got no/such/folder, expected a checkout"),
        (["--peer"], "unrecognized arguments: --peer"),
    ],
)
def test_bad_arguments_are_told_and_end_with_2(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments(words)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_the_list_of_refusals_is_well_formed_and_each_is_for_a_run_that_there_is() -> None:
    titles = {
        name if len(suite.runs) == 1 else f"{name}, {run}"
        for name, suite in SUITES.items()
        for run in suite.runs
        if run != "stock"
    }
    allowed = read_allowed(PEERS / "allowed.toml")
    assert {entry.suite for entry in allowed} <= titles
    assert len({*allowed}) == len(allowed)


@pytest.mark.parametrize(
    "entry",
    [
        'suite = "a"\ntests = ["*"]\nmessage = "b"',
        'suite = "a"\ntests = ["*"]\nmessage = ""\nreason = "c"',
        'suite = "a"\ntests = ["*"]\nmessage = "b"\nreason = "c"\nsince = "d"',
    ],
    ids=["no reason", "every message", "another key"],
)
def test_a_refusal_that_lacks_something_is_refused(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "allowed.toml"
    path.write_text(f"[[allowed]]\n{entry}\n")
    with pytest.raises(ValueError, match=r"allowed.toml: entry 1: got .*, expected message, reason, suite, tests"):
        read_allowed(path)


@pytest.mark.parametrize(
    ("ours", "told"),
    [
        ({"a::test_b": WRONG}, "failed: AssertionError: 1.0 != 2.0"),
        ({"a::test_b": {"outcome": "skipped", "message": "no GPU"}}, "skipped: no GPU"),
        ({}, "missing: did not run"),
    ],
    ids=["differs", "skipped", "not run"],
)
def test_what_passes_with_the_peer_alone_must_pass_with_ours(ours: Outcomes, told: str) -> None:
    result = compare({"a::test_b": PASSED}, ours, [])
    assert result.failed == {"a::test_b": told}
    assert any("test_b" in problem for problem in _problems("a suite", result))


def test_a_refusal_is_allowed_by_name_and_message_and_nothing_else_is() -> None:
    stock: Outcomes = dict.fromkeys(("a::test_dropout", "a::test_dropout_too", "a::test_other", "a::test_fine"), PASSED)
    ours = {"a::test_dropout": REFUSED, "a::test_dropout_too": WRONG, "a::test_other": REFUSED, "a::test_fine": PASSED}
    result = compare(stock, ours, [DROPOUT])
    assert result.allowed == {"there is no dropout": 1}
    assert result.failed.keys() == {"a::test_dropout_too", "a::test_other"}
    assert result.agreed == ["a::test_fine"]


def test_a_refusal_that_nothing_needs_is_a_problem() -> None:
    result = compare({"a::test_dropout": PASSED}, {"a::test_dropout": PASSED}, [DROPOUT])
    assert _problems("a suite", result) == [
        "a suite: allowed.toml: no failure needs this any more: there is no dropout"
    ]


def test_what_the_peer_fails_or_skips_itself_is_not_compared() -> None:
    stock = {"a::test_b": WRONG, "a::test_c": {"outcome": "skipped", "message": "no GPU"}}
    result = compare(stock, {"a::test_b": REFUSED, "a::test_c": PASSED}, [])
    assert result.not_compared == {"failed: AssertionError: 1.0 != 2.0": 1, "skipped: no GPU": 1}
    assert _problems("a suite", result) == ["a suite: no test agreed: nothing was compared"]


def test_without_a_run_of_the_peer_every_failure_counts() -> None:
    ours = {"test_a": PASSED, "test_b": WRONG, "test_c": {"outcome": "skipped", "message": "no GPU"}}
    result = compare(ours, ours, [])
    assert (result.agreed, result.failed.keys(), result.not_compared.total()) == (["test_a"], {"test_b"}, 1)


def test_a_run_that_concerns_some_tests_is_compared_on_those() -> None:
    concerns = selector(SUITES["transformers-common"], "applied")
    assert concerns("a.py::Llama4VisionTest::test_b")
    assert not concerns("a.py::SiglipVisionTest::test_b")
    assert selector(SUITES["transformers-common"], "vit_varlen")("a.py::SiglipVisionTest::test_b")


def test_the_models_own_suites_need_a_checkout(tmp_path: Path) -> None:
    suite = SUITES["transformers-models"]
    folders = {"transformers": tmp_path}
    assert lacking(suite, folders) == suite.needs
    (tmp_path / suite.needs).parent.mkdir(parents=True)
    (tmp_path / suite.needs).touch()
    assert lacking(suite, folders) is None


def test_a_suite_that_did_not_run_keeps_its_last_result(tmp_path: Path) -> None:
    def write(suite: str, ours: Outcomes) -> None:
        result = compare(dict.fromkeys(ours, PASSED), ours, [DROPOUT])
        versions = {"python": "3.11"}
        written = record(result, source="a peer 1.0", versions=versions, date="2026-01-02", seconds=3.4)
        write_results({suite: written}, tmp_path)

    write("first", {"a::test_dropout": REFUSED, "a::test_b": PASSED})
    write("second", {"a::test_b": WRONG})
    results = json.loads((tmp_path / "peers.json").read_text())
    assert results["first"]["allowed"] == {"there is no dropout": 1}
    assert results["second"]["failed"] == {"a::test_b": "failed: AssertionError: 1.0 != 2.0"}
    table = (tmp_path / "peers.md").read_text()
    assert "| first | a peer 1.0 | 2026-01-02 | 1 | 1 | 0 | 0 | 3 |" in table
    assert "| second | a peer 1.0 | 2026-01-02 | 0 | 0 | 1 | 0 | 3 |" in table
    assert "- first, 1: there is no dropout" in table


class _Index:
    """A package index on this machine."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url

    def add(self, name: str, digest: str) -> None:
        (self.folder / name).mkdir()
        (self.folder / f"{name}/index.html").write_text(f'<a href="../{name}-1.0.tar.gz#sha256={digest}">it</a>')
        with tarfile.open(self.folder / f"{name}-1.0.tar.gz", "w:gz") as archive:
            member = tarfile.TarInfo(f"{name}-1.0/tests/test_a.py")
            archive.addfile(member, io.BytesIO())


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Index]:
    folder = tmp_path / "index"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("PIP_INDEX_URL", url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield _Index(folder, url)
        server.shutdown()
        thread.join()


def test_a_source_distribution_comes_from_the_index_of_pip_and_is_kept(index: _Index, tmp_path: Path) -> None:
    index.add("a_peer", "")
    cache = tmp_path / "cache"
    cache.mkdir()
    folder = source_distribution("a_peer", "1.0", cache)
    assert (folder / "tests/test_a.py").is_file()
    shutil.rmtree(index.folder)
    assert source_distribution("a_peer", "1.0", cache) == folder
    assert [path.name for path in cache.iterdir()] == ["a_peer-1.0"]


def test_a_distribution_that_is_missing_or_not_the_one_named_is_told(index: _Index, tmp_path: Path) -> None:
    index.add("a_peer", "0" * 64)
    with pytest.raises(DownloadError, match="with another sha256"):
        source_distribution("a_peer", "1.0", tmp_path)
    with pytest.raises(DownloadError, match=re.escape("the package index has no a_peer-2.0.tar.gz")):
        source_distribution("a_peer", "2.0", tmp_path)
    with pytest.raises(DownloadError, match="could not be read"):
        source_distribution("another", "1.0", tmp_path)


# Stands for flash-attn's file: its imports, its device, and options that are not ours.
FLASH_TESTS = """
import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func
from flash_attn.bert_padding import pad_input
from flash_attn.flash_attn_interface import _get_block_size_n
from flash_attn.layers.rotary import apply_rotary_emb

assert torch.cuda.get_device_capability("cuda") == (8, 0)
device = "cuda"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q,seqlen_k", [(3, 4), (1024, 4)])
@pytest.mark.parametrize("d", [16, 59])
def test_flash_attn_varlen_output(d, seqlen_q, seqlen_k, causal):
    device = "cuda"
    q, k = torch.randn(seqlen_q, 2, d, device=device), torch.randn(seqlen_k, 2, d, device=device)
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (seqlen_q, seqlen_k))
    out, lse, _ = flash_attn_varlen_func(q, k, k, cu_q, cu_k, seqlen_q, seqlen_k, 0.0, causal=causal,
                                         return_attn_probs=True)
    expected = torch.einsum("qhd,khd->hqk", q, k).mul(d**-0.5).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("hqk,khd->qhd", expected, k))


def test_flash_attn_bwd_varlen_overflow():
    qkv = torch.randn(4, 3, 2, 16)
    out = flash_attn_varlen_qkvpacked_func(qkv, torch.tensor([0, 4], dtype=torch.int32), 4)
    assert out.shape == (4, 2, 16)


def test_flash_attn_varlen_qkvpacked():
    assert False, "differs"


def test_flash_attn_varlen_deterministic():
    with pytest.raises(NotImplementedError):
        flash_attn_func()


test_flash_attn_varlen_qkvpacked.pytestmark = []
test_flash_attn_bwd_varlen_overflow.pytestmark = []
test_flash_attn_varlen_deterministic.pytestmark = []
"""


def test_a_suite_runs_on_the_shim_with_what_is_ours_and_its_outcomes_are_kept(tmp_path: Path) -> None:
    checkout = tmp_path / "a checkout"
    (checkout / "tests").mkdir(parents=True)
    (checkout / "flash_attn").mkdir()
    (checkout / "tests/test_flash_attn.py").write_text(FLASH_TESTS)
    (checkout / "flash_attn/bert_padding.py").write_text("def pad_input(): pass\n")
    out = tmp_path / "outcomes.json"
    command = [sys.executable, "-m", "pytest", "-c", str(PEERS / "pytest.ini"), str(PEERS / "flash_attn_varlen.py")]
    variables = {"PEERS_FLASH_ATTN": str(checkout), "PEERS_RUN": "varlen_attention", "PEERS_OUTCOMES": str(out)}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stdout
    outcomes = {test.partition("::")[2]: result for test, result in json.loads(out.read_text())["outcomes"].items()}
    failed = {test: result["message"] for test, result in outcomes.items() if result["outcome"] == "failed"}
    assert failed.keys() == {"test_flash_attn_varlen_qkvpacked", "test_flash_attn_varlen_output[59-3-4-False]"}
    assert "differs" in failed["test_flash_attn_varlen_qkvpacked"]
    assert "got head_dim 59" in failed["test_flash_attn_varlen_output[59-3-4-False]"]
    passed = outcomes.keys() - failed.keys()
    assert passed == {
        "test_flash_attn_varlen_output[16-3-4-False]",
        "test_flash_attn_bwd_varlen_overflow",
        "test_flash_attn_varlen_deterministic",
    }


@pytest.mark.parametrize(
    "option",
    [
        {"dropout_p": 0.1},
        {"causal": True},
        {"window_size": (4, 4)},
        {"softcap": 30.0},
        {"alibi_slopes": torch.ones(2)},
        {"block_table": torch.zeros(1, 1, dtype=torch.int32)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_the_shim_refuses_what_would_change_the_result(option: dict[str, object]) -> None:
    q = torch.randn(4, 2, 16)
    boundaries = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"{next(iter(option))}: got "):
        flash_attn_varlen_func(q, q, q, boundaries, boundaries, 4, 4, **option)  # type: ignore[arg-type]
