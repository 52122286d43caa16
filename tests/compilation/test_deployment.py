"""Exported modules: right in another process for every size, callable only with their weights, else refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from vit_encoder import Llama4VisionConfig, Llama4VisionModel, export, load, support_torch_compile
from vit_encoder.compilation import DeployedModule, set_forward_context
from vit_encoder.compilation.cache import package_code
from vit_encoder.compilation.deployment import export as exporting
from vit_encoder.compilation.deployment import load as deployed
from vit_encoder.compilation.deployment import manifest
from vit_encoder.initialise import initialise_

from tests.support import assert_same_bits

pytestmark = pytest.mark.costly

CONFIG = replace(Llama4VisionConfig.tiny(), num_hidden_layers=2)
TILES = (1, 17, 2, 33)


@support_torch_compile(dynamic_arg_dims={"x": 0, "y": 0})
class Small(nn.Module):
    """A little arithmetic, with a parameter, and a buffer that its state_dict does not have."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 4.0))
        self.register_buffer("offset", torch.full((3,), 0.5), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Shapes: [n, 3], [n, 3] -> [n]."""
        return (x.sin() * self.weight + y * self.offset).sum(1)


@pytest.fixture(scope="module")
def model() -> Llama4VisionModel:
    model = Llama4VisionModel(CONFIG).eval()
    initialise_(model, seed=0)
    return model


@pytest.fixture(scope="module")
def encoder(model: Llama4VisionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model, [pixels(3)], tmp_path_factory.mktemp("deployed") / "encoder")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(Small(), [torch.ones(1, 3), torch.ones(1, 3)], tmp_path_factory.mktemp("deployed") / "small")


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """The small module's folder, to break."""
    return Path(shutil.copytree(small, tmp_path / "copy"))


def pixels(tiles: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tiles, 3, CONFIG.image_size, CONFIG.image_size, generator=generator)


def edit(folder: Path, **fields: Any) -> None:
    path = folder / manifest.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def wrapped(x: Tensor) -> Tensor:
    """A tensor of a subclass that holds its values elsewhere, as quantised and distributed ones do."""
    return TwoTensor(x, x)


def in_another_process(script: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == ""
    return done.stdout


@torch.no_grad()
def test_another_process_runs_every_tile_count_without_a_compiler(
    model: Llama4VisionModel, encoder: Path, tmp_path: Path
) -> None:
    script = """
        import sys, torch
        from vit_encoder import load
        folder, *files = sys.argv[1:]
        run = load(folder)
        for file in files:
            torch.save(run(torch.load(file)), file)
        print([name for name in ("torch._inductor", "torch._dynamo", "triton") if name in sys.modules])
    """
    files = [tmp_path / f"{tiles}.pt" for tiles in TILES]
    for tiles, file in zip(TILES, files, strict=True):
        torch.save(pixels(tiles, seed=tiles), file)
    assert in_another_process(script, encoder, *files) == "[]\n"
    for tiles, file in zip(TILES, files, strict=True):
        expected = model(pixels(tiles, seed=tiles))
        # Other orders of summation; the errors against fp64 are tests/encoder/test_parity.py's subject.
        assert (torch.load(file) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_graph_holds_no_weights(model: Llama4VisionModel, encoder: Path) -> None:
    held = model.layers[0].mlp.fc1.weight.detach().numpy().tobytes()[:64]  # type: ignore[union-attr, operator]
    assert held in (encoder / manifest.WEIGHTS).read_bytes()
    assert held not in (encoder / manifest.GRAPH).read_bytes()
    stored = json.loads((encoder / manifest.MANIFEST).read_text())["weights"]
    assert set(stored) == {*model.state_dict(), "rotary.cos", "rotary.sin"}


@torch.no_grad()
def test_given_weights_are_used_where_they_lie(encoder: Path) -> None:
    other = Llama4VisionModel(CONFIG).eval()
    initialise_(other, seed=1)
    run = load(encoder, weights=other.state_dict())
    expected = other(pixels(2))
    assert (run(pixels(2)) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert all(run.weights[name].data_ptr() == x.data_ptr() for name, x in other.state_dict().items())
    other.adapter.fc2.weight.zero_()
    assert not run(pixels(2)).any()


def test_threads_take_turns(encoder: Path) -> None:
    script = """
        import sys, torch
        from concurrent.futures import ThreadPoolExecutor
        from vit_encoder import load
        run = load(sys.argv[1])
        batches = [torch.randn(tiles, *run.manifest["inputs"][0]["shape"][1:]) for tiles in (1, 2, 3, 4)]
        expected = [run(batch) for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(run, 3 * batches))
        print(all(torch.equal(result, expected[index % 4]) for index, result in enumerate(results)))
    """
    # In the same process a deadlock would stop the tests.
    assert in_another_process(script, encoder) == "True\n"


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Various(nn.Module):
    """Weights of every shape, dtype, layout and role; each changes the result, but for the unused and empty ones."""

    def __init__(self) -> None:
        super().__init__()
        for elements in (*range(1, 10), 16):
            # Equal values: what Inductor folds.
            self.register_parameter(f"of_{elements}", nn.Parameter(torch.ones(elements)))
        packed = torch.arange(24.0).view(4, 6)
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.transposed = nn.Parameter(torch.ones(3, 2).t())
        self.columns, self.others = (nn.Parameter(packed[:, start::2]) for start in (0, 1))
        self.brain = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        self.double_ = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.unused, self.empty = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(0, 3))
        self.register_buffer("whole", torch.tensor([1, 2, 3]))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("outside", torch.ones(16), persistent=False)
        self.table = torch.arange(12.0)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [n, 16] -> [n, 16]."""
        weights = dict([*self.named_parameters(), *self.named_buffers()])
        vectors = [(index + 1) * (weights[f"of_{index + 1}"] + 1).sum() for index in range(9)]
        x = x * (weights["of_16"] + 1) * self.scalar + torch.stack(vectors).sum() + weights["outside"]
        x = x + (self.transposed.t() * 2).sum(0).prod() + (self.columns * self.others.t().reshape(4, 3)).sum()
        x = x + self.brain.view(2, 2).t().float().sum() + self.double_.float() + weights["whole"].sum()
        x = torch.where(weights["flag"], x, x.neg()) + torch.tensor([float(i) for i in range(16)]) * self.table.sum()
        return x + self.empty.sum() + torch.zeros_like(self.unused).sum()


@pytest.fixture(scope="module")
def various(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(Various(), [torch.ones(3, 16)], tmp_path_factory.mktemp("deployed") / "various")


VARIOUS = {name: x.detach() for name, x in [*Various().named_parameters(), *Various().named_buffers()]}


@torch.no_grad()
@given(
    given_names=st.sets(st.sampled_from(sorted(VARIOUS)), min_size=1),
    layout=st.sampled_from(["plain", "unaligned", "transposed", "with gradients"]),
    seed=st.integers(0, 9),
)
def test_every_weight_takes_any_values(various: Path, given_names: set[str], layout: str, seed: int) -> None:
    torch.manual_seed(seed)
    module, x = Various(), torch.randint(-9, 9, (2, 16)).float()
    own = dict([*module.named_parameters(), *module.named_buffers()])
    weights: dict[str, Tensor] = {}
    for name in sorted(given_names):
        values = torch.randint(-9, 9, VARIOUS[name].shape).to(VARIOUS[name].dtype)
        own[name].copy_(values)
        if layout == "unaligned":
            values = torch.cat([values.flatten()[:1], values.flatten()])[-values.numel() :].view(values.shape)
        elif layout == "transposed":
            values = values.mT.contiguous().mT if values.dim() == 2 else values
        elif layout == "with gradients" and values.is_floating_point():
            values = nn.Parameter(values)
        weights[name] = values
    # Sums of whole numbers are exact in any order.
    assert_same_bits(load(various, weights=weights)(x), module(x))


def test_the_manifest_names_every_weight_and_no_other(various: Path) -> None:
    assert set(json.loads((various / manifest.MANIFEST).read_text())["weights"]) == set(VARIOUS)


@torch.no_grad()
def test_any_layout_of_the_arguments(small: Path) -> None:
    run, module = load(small), Small()
    buffer = torch.randn(40)
    layouts = [buffer[:6].view(2, 3), buffer[1:7].view(2, 3), buffer[:6].view(3, 2).t(), buffer[:3].expand(2, 3)]
    for x in layouts:
        for y in layouts:
            torch.testing.assert_close(run(x, y), module(x, y))
    assert all(deployed.laid_out(x).data_ptr() % 16 == 0 for x in layouts)


def test_a_configuration_that_is_expected(encoder: Path) -> None:
    assert isinstance(load(encoder, configuration=CONFIG), DeployedModule)
    with pytest.raises(ValueError, match=r"configuration: got num_hidden_layers 3 \(exported: 2\); expected"):
        load(encoder, configuration=replace(CONFIG, num_hidden_layers=3))


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"weight": torch.ones(4)}, ValueError, r"weights: got weight of .*\[4\].*expected .*\[3\]"),
        ({"weight": torch.ones(3).double()}, TypeError, "weights: got weight of .*float64.*expected .*float32"),
        ({"weigth": torch.ones(3)}, ValueError, "weights: got weigth, expected names of Small's weights"),
        ({0: torch.ones(3)}, ValueError, "weights: got 0, expected names of Small's weights"),
        ({"weight": [1.0, 2.0, 3.0]}, TypeError, "weights: weight: got list, expected a tensor"),
        ({"weight": torch.ones(3).to_sparse()}, TypeError, "weights: weight: got a Tensor of layout torch.sparse_coo"),
        ({"weight": wrapped(torch.ones(3))}, TypeError, "weights: weight: got a TwoTensor"),
        ({"weight": torch.ones(3, device="meta")}, ValueError, "weights: got weight on meta, expected .* values"),
        ([torch.ones(3)], TypeError, "weights: got list, expected a mapping"),
    ],
)
def test_other_weights_are_refused(weights: Any, error: type[Exception], message: str, small: Path) -> None:
    with pytest.raises(error, match=message):
        load(small, weights=weights)


def test_another_surrounding_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device: got cuda, expected cpu"):
        load(copy, device="cuda")
    with pytest.raises(ValueError, match="device: got 'gpu', expected a device of torch"):
        load(copy, device="gpu")
    assert load(copy, device="cpu:0")(torch.ones(2, 3), torch.ones(2, 3)).shape == (2,)
    edit(copy, torch="2.0.0")
    with pytest.raises(ValueError, match=r"torch: got 2\.\S+, expected 2\.0\.0 as at the export"):
        load(copy)
    edit(copy, torch=torch.__version__, machine={"type": "cpu", "features": ["quantum"]})
    with pytest.raises(ValueError, match="device: got a processor without quantum"):
        load(copy)
    edit(copy, machine={"type": "cuda", "architecture": "sm_90"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: got cuda, which this process does not have"):
        load(copy)


def test_other_code_of_the_ops_is_refused(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = json.loads((encoder / manifest.MANIFEST).read_text())["ops"]
    assert code["packages"] == ["vit_kernels"]
    monkeypatch.setattr(manifest, "package_code", lambda packages: "changed")
    with pytest.raises(ValueError, match="ops: the code of vit_kernels is not what it was"):
        load(encoder)


def test_the_packages_of_the_ops_are_imported(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ops_of_a_user.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    edit(copy, ops={"packages": ["ops_of_a_user"], "code": package_code(["ops_of_a_user"])})
    with pytest.raises(ValueError, match="configuration: got"):
        load(copy, configuration={"layers": 3})
    assert "ops_of_a_user" not in sys.modules
    load(copy)
    assert sys.modules.pop("ops_of_a_user")


@pytest.mark.parametrize(
    ("packages", "code"),
    [
        (["ops_of_nobody"], None),
        (["ops_of_nobody"], ""),
        (["ops_of_nobody"], package_code(["json"])),
        (["json", "ops_of_nobody"], package_code(["json"])),
        (["ops_of_nobody.inner"], package_code(["json"])),
        (["../ops_of_nobody"], package_code(["json"])),
        (["no_such_package"], "0" * 64),
        (["sys"], "0" * 64),
        (["ops_of_nobody", 3], "0" * 64),
        ("ops_of_nobody", "0" * 64),
    ],
)
def test_no_package_is_imported_that_is_not_the_one_of_the_export(
    packages: Any, code: str | None, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ops_of_nobody").mkdir()
    for name in ("__init__", "inner"):
        (tmp_path / "ops_of_nobody" / f"{name}.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    edit(copy, ops={"packages": packages, "code": code})
    with pytest.raises(ValueError, match="ops"):
        load(copy)


OTHER_VALUES = {
    "format": (0, "2", None),
    "module": (None, 3, ["Small"]),
    "inputs": (None, {}, ["x"], [{"name": "x", "dtype": "torch.float32"}]),
    "weights": (None, [], {"weight": "torch.float32"}, {"weight": {"dtype": "torch.float32", "shape": [3.0]}}),
    "torch": (None, 2.13),
    "machine": (None, "cpu", {"type": "cpu"}, {"type": "abacus", "features": []}, {"type": "cuda"}),
    "ops": (None, [], {"packages": []}, {"code": ""}),
    "graph_sha256": (None, 0, "", "0" * 63),
}


@pytest.mark.parametrize("key", [*OTHER_VALUES, "configuration"])
def test_a_manifest_without_a_key_or_with_another_type_is_one_error(key: str, copy: Path) -> None:
    path = copy / manifest.MANIFEST
    whole = json.loads(path.read_text())
    shape_of_text, shape_below_0 = ([whole["inputs"][0] | {"shape": shape}] for shape in (["4*"], ["-s0"]))
    others = OTHER_VALUES.get(key, ()) + ((shape_of_text, shape_below_0) if key == "inputs" else ())
    for broken in ({name: whole[name] for name in whole if name != key}, *(whole | {key: value} for value in others)):
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=rf"{manifest.MANIFEST}: got .*({key}|another format)"):
            load(copy)
    path.write_text(json.dumps({"format": manifest.FORMAT}))
    with pytest.raises(ValueError, match="got no module, no configuration, no inputs, no weights, no torch, no mach"):
        load(copy)


@pytest.mark.parametrize("name", [manifest.GRAPH, manifest.WEIGHTS, manifest.MANIFEST])
def test_broken_files_are_refused(name: str, copy: Path) -> None:
    content = (copy / name).read_bytes()
    for broken in (content[: len(content) // 2], b"{}", b""):
        (copy / name).write_bytes(broken)
        with pytest.raises(ValueError, match=name):
            load(copy)
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load(copy)


def test_a_file_with_other_weights_gives_no_module(copy: Path) -> None:
    save_file({"weight": torch.ones(3)}, copy / manifest.WEIGHTS)
    with pytest.raises(ValueError, match=rf"{manifest.WEIGHTS}: .*offset"):
        load(copy)
    save_file({"weight": torch.ones(4), "offset": torch.ones(3)}, copy / manifest.WEIGHTS)
    with pytest.raises(ValueError, match=rf"{manifest.WEIGHTS}: got weight of .*\[4\]"):
        load(copy)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ([torch.ones(2, 3)], ValueError, "args: got 1 arguments, expected 2: x, y"),
        ([torch.ones(2, 3), None], TypeError, "y: got NoneType, expected a tensor"),
        ([torch.ones(2, 3).double(), torch.ones(2, 3)], TypeError, "x: got torch.float64, expected torch.float32"),
        ([torch.ones(2, 3, device="meta"), torch.ones(2, 3)], ValueError, "x: got device meta, expected cpu"),
        ([torch.ones(0, 3), torch.ones(0, 3)], ValueError, r"x: got shape \(0, 3\)"),
        ([torch.ones(2, 4), torch.ones(2, 3)], ValueError, r"x: got shape \(2, 4\)"),
        ([torch.ones(3), torch.ones(2, 3)], ValueError, r"x: got shape \(3,\)"),
        ([torch.ones(2, 3), torch.ones(5, 3)], ValueError, r"y: got shape \(5, 3\), expected .*, where \{'s\d+': 2\}"),
        ([torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)], ValueError, "x: got requires_grad"),
        ([[[1.0, 2.0, 3.0]], torch.ones(1, 3)], TypeError, "x: got list, expected a tensor"),
        ([torch.ones(2, 3).to_sparse(), torch.ones(2, 3)], TypeError, "x: got a Tensor of layout torch.sparse_coo"),
        ([wrapped(torch.ones(2, 3)), torch.ones(2, 3)], TypeError, "x: got a TwoTensor"),
        (
            [torch.nested.nested_tensor([torch.ones(3)], layout=torch.jagged), torch.ones(1, 3)],
            TypeError,
            "x: got a NestedTensor of layout",
        ),
    ],
)
def test_bad_arguments(args: list[Any], error: type[Exception], message: str, small: Path) -> None:
    with pytest.raises(error, match=message):
        load(small)(*args)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of torch's own dual tensors
def test_no_gradient_is_lost_silently(small: Path) -> None:
    x, run = torch.ones(2, 3), load(small, weights={"weight": torch.ones(3, requires_grad=True)})
    assert not run(x, x).requires_grad
    with torch.no_grad():
        assert run(x.clone().requires_grad_(), x).shape == (2,)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="y: got a dual tensor, expected none"):
        run(x, forward_ad.make_dual(x, x))
    for transform in (torch.func.vmap, torch.func.functionalize, lambda run: torch.func.grad(lambda *x: run(*x).sum())):
        with pytest.raises(TypeError, match=r"x: got a tensor of a torch\.func transform, expected a plain one"):
            transform(run)(torch.ones(2, 2, 3), torch.ones(2, 2, 3))


@torch.no_grad()
def test_a_negative_view_is_its_values(small: Path) -> None:
    # As x.conj().imag is, but contiguous: no copy for the layout's sake hides the difference.
    x = torch._neg_view(torch.randn(2, 3))
    torch.testing.assert_close(load(small)(x, x), Small()(x, x))
    weights = {"weight": x[0]}
    torch.testing.assert_close(load(small, weights=weights)(x, x), load(small, weights={"weight": x[0] + 0})(x, x))


@support_torch_compile(dynamic_arg_dims={"x": 0, "order": 0})
class Grouped(nn.Module):
    """Four rows a group, as Qwen2.5-VL's patches and units."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """Shapes: [4 * n, 3], [n] -> [n, 12]."""
        torch._check(x.shape[0] == 4 * order.shape[0])
        return (x * self.weight).unflatten(0, (-1, 4)).flatten(1).index_select(0, order)


def test_a_size_that_is_a_multiple_of_another(tmp_path: Path) -> None:
    module = Grouped()
    run = load(export(module, [torch.randn(8, 3), torch.arange(2)], tmp_path / "grouped"))
    for groups in (1, 5):
        x, order = torch.randn(4 * groups, 3), torch.randperm(groups)
        torch.testing.assert_close(run(x, order), module(x, order).detach())
    for rows, groups in ((8, 3), (9, 2), (0, 0)):
        with pytest.raises(ValueError, match=r"got shape .*, expected \['4?\*?s\d+'"):
            run(torch.randn(rows, 3), torch.arange(groups))


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Weightless(nn.Module):
    """Nothing to learn."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [n, 3] -> [n, 3]."""
        return x.sin()


def test_a_module_without_weights(tmp_path: Path) -> None:
    run = load(export(Weightless(), [torch.ones(2, 3)], tmp_path / "weightless"))
    x = torch.randn(5, 3)
    torch.testing.assert_close(run(x), x.sin())


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Conditional(nn.Module):
    """Another graph for more than four rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [n, 3] -> [n, 3]."""
        return x * self.weight if x.shape[0] > 4 else x


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Pair(Conditional):
    """Two results."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Shapes: [n, 3] -> 2 x [n, 3]."""
        return x, x * self.weight


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Nothing(nn.Module):
    """No result."""

    def forward(self, x: Tensor) -> None:
        """Shapes: [n, 3]."""


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Size(nn.Module):
    """A number."""

    def forward(self, x: Tensor) -> int:
        """Shapes: [n, 3]."""
        return x.shape[0]


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Counts(Conditional):
    """Counts its calls in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [n, 3] -> [n, 3]."""
        self.calls.add_(1)
        return x * self.weight


@support_torch_compile(dynamic_arg_dims={"x": 0})
class WritesToItsArgument(nn.Module):
    """Through a view."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [n, 3] -> [n, 3]."""
        x[:, 1:].mul_(2)
        return x + 1


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Noisy(nn.Module):
    """Something else in train mode, where no class of a part says so."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [n, 3] -> [n, 3]."""
        return nn.functional.dropout(x, 0.5, self.training)


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Two(nn.Module):
    """Two buffers that forward does not read."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.register_buffer("first", first)
        self.register_buffer("second", second)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [n, 3] -> [n, 3]."""
        return x + 1


def changed(module: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """The module with another parameter of this name."""
    setattr(module, name, nn.Parameter(change(getattr(module, name).detach())))
    return module


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports come as far as the compiler."""

    def compiles(*args: Any) -> None:
        raise AssertionError("would compile")

    monkeypatch.setattr(exporting, "_compile", compiles)


@pytest.mark.parametrize(
    ("module", "args", "error", "message"),
    [
        (nn.Linear(3, 3), [torch.ones(2, 3)], TypeError, "module: got Linear, expected a class decorated"),
        (Small(), [torch.ones(2, 3), None], TypeError, "args: got Tensor, NoneType, expected one or more"),
        (Small(), [], TypeError, "args: got no tensors, expected one or more"),
        (Small(), [torch.ones(2, 3)] * 3, TypeError, "args: got 3, expected at most 2: x, y"),
        (Pair(), [torch.ones(2, 3)], TypeError, r"module: got a result of [\s\S]*, expected one tensor"),
        (Conditional(), [torch.ones(6, 3)], ValueError, "x: got a graph that holds for .*, expected one for every"),
        (Nothing(), [torch.ones(2, 3)], TypeError, "module: got a result of .*, expected one tensor"),
        (Size(), [torch.ones(2, 3)], TypeError, "module: got a result of .*, expected one tensor"),
        (Conditional(), torch.ones(2, 3), TypeError, "args: got one tensor, expected one or more tensors in a seq"),
        (Conditional(), [torch.ones(2, 3).to_sparse()], TypeError, "x: got a Tensor of layout torch.sparse_coo"),
        (Conditional(), [torch.ones(2, 3, device="meta")], ValueError, "x: got device meta, expected .* values"),
        (Conditional(), [torch.tensor(1.0)], ValueError, r"x: got shape \(\), expected dimensions 0"),
        (Small(), [torch.ones(2, 3), torch.ones(2, 3, device="meta")], ValueError, "y: got device meta, expected cpu"),
        (Conditional().to("meta"), [torch.ones(6, 3)], ValueError, "module: got weight on meta, expected cpu"),
        (changed(Conditional(), "weight", wrapped), [torch.ones(6, 3)], TypeError, "module: weight: got a TwoTensor"),
        (changed(Counts(), "weight", Tensor.clone), [torch.ones(6, 3)], ValueError, "module: .* writes to calls"),
        (WritesToItsArgument(), [torch.ones(6, 3)], ValueError, "module: got a forward that writes to x"),
        (Small().train(), [torch.ones(2, 3)] * 2, AssertionError, "would compile"),
        (Noisy(), [torch.ones(2, 3)], ValueError, "module: got train mode, .* expected eval"),
        (Noisy().eval(), [torch.ones(2, 3)], AssertionError, "would compile"),
    ],
)
def test_what_cannot_be_exported(
    module: nn.Module, args: Any, error: type[Exception], message: str, tmp_path: Path, no_compiler: None
) -> None:
    training = [part.training for part in module.modules()]
    with pytest.raises(error, match=message):
        export(module, args, tmp_path / "folder")
    assert not list(tmp_path.iterdir())
    assert [part.training for part in module.modules()] == training


@pytest.mark.parametrize(
    "share",
    [
        pytest.param(lambda x: (x, x), id="the very tensor"),
        pytest.param(lambda x: (x, x.view(-1)), id="another shape"),
        pytest.param(lambda x: (x[:3], x[2:]), id="a part"),
        pytest.param(lambda x: (x[::2], x[1:3]), id="rows of a part"),
        pytest.param(lambda x: (x, x.view(torch.int32)), id="another dtype"),
        pytest.param(lambda x: (x[0].expand(3, 4), x[:1]), id="expanded"),
    ],
)
def test_tied_weights_are_refused_before_compiling(share: Any, tmp_path: Path, no_compiler: None) -> None:
    first, second = share(torch.ones(4, 4))
    with pytest.raises(ValueError, match="module: got first and second in the same memory, expected weights of their"):
        export(Two(first, second), [torch.ones(2, 3)], tmp_path / "folder")
    part = Two(torch.ones(2), torch.ones(3))
    part.again = nn.ModuleList([inner := nn.Linear(2, 2), inner])
    with pytest.raises(ValueError, match=r"module: got again\.0\.\w+ and again\.1\.\w+ in the same memory"):
        export(part, [torch.ones(2, 3)], tmp_path / "folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", [lambda x: (x[:2], x[2:]), lambda x: (x[:, ::2], x[:, 1::2]), lambda x: (x[:0], x)])
def test_weights_that_lie_beside_one_another_are_not_tied(part: Any, tmp_path: Path, no_compiler: None) -> None:
    with pytest.raises(AssertionError, match="would compile"):
        export(Two(*part(torch.ones(4, 4))), [torch.ones(2, 3)], tmp_path / "folder")


def test_autocast_is_refused_by_both(small: Path, tmp_path: Path, no_compiler: None) -> None:
    x, run = torch.ones(2, 3), load(small)
    with torch.autocast("cpu"):
        with pytest.raises(ValueError, match="autocast: got it enabled for cpu, expected none"):
            export(Small(), [x, x], tmp_path / "folder")
        with pytest.raises(ValueError, match="autocast: got it enabled for cpu, expected none"):
            run(x, x)
        with torch.autocast("cpu", enabled=False):
            run(x, x)
    assert not list(tmp_path.iterdir())


def test_no_tensor_that_is_not_the_module_s_own_enters_an_export(tmp_path: Path, no_compiler: None) -> None:
    x = torch.ones(2, 3)
    with set_forward_context(y=x), pytest.raises(ValueError, match="set_forward_context: got y, expected no tensors"):
        export(Small().eval(), [x], tmp_path / "folder")
    module: Any = Conditional()
    weight = module.weight
    del module.weight
    module.weight = weight.detach().requires_grad_()
    with pytest.raises(ValueError, match=r"module: got \S+ that require gradients, expected these of its parameters"):
        export(module, [torch.ones(6, 3)], tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_other_users_may_read_the_folder_and_nothing_lies_beside_it(small: Path) -> None:
    expected = small.parent / "made here"
    expected.mkdir()
    assert small.stat().st_mode == expected.stat().st_mode
    (expected / "file").touch()
    modes = {file.name: file.stat().st_mode for file in small.iterdir()}
    assert set(modes.values()) == {(expected / "file").stat().st_mode}, modes
    shutil.rmtree(expected)
    assert list(small.parent.iterdir()) == [small]


def test_a_tilde_is_the_home(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(copy.parent))
    with pytest.raises(FileExistsError, match=f"folder: got {copy}, expected"):
        export(Small(), [torch.ones(2, 3)], "~/copy")
    assert isinstance(load("~/copy"), DeployedModule)


def test_a_forked_child_leaves_its_parent_s_files(small: Path) -> None:
    script = """
        import gc, os, pathlib, re, sys
        from vit_encoder import load
        run = load(sys.argv[1])
        maps = pathlib.Path("/proc/self/maps").read_text()
        (library,) = {line.split()[-1] for line in maps.splitlines() if ".wrapper.so" in line}
        for leave in (os._exit, sys.exit):
            if (pid := os.fork()) == 0:
                del run
                gc.collect()
                leave(0)
            assert os.waitpid(pid, 0)[1] == 0
            print(os.path.exists(library))
    """
    assert in_another_process(script, small) == "True\nTrue\n"


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"folder: got .*, expected one that does not exist"):
        export(Small(), [torch.ones(2, 3), torch.ones(2, 3)], tmp_path)


def test_ops_that_no_package_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "package_code", lambda packages: None)
    with pytest.raises(ValueError, match=r"module: got ops of .*, expected those of packages"):
        export(Small(), [torch.ones(2, 3), torch.ones(2, 3)], tmp_path / "folder")
    assert not list(tmp_path.iterdir())
