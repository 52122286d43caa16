"""How vLLM's models make and call the attention that ours stands in for: a convention not seen before fails here."""

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

NAME = "MMEncoderAttention"
# Whose instances are MMEncoderAttention too; it has another name, and so it stays vLLM's.
SUBCLASSES = {"WhisperEncoderAttention"}
# A parameter of CLIP's and SigLIP's layers.
CLASSES = {NAME, "attn_cls", *SUBCLASSES}
MADE_WITH = ("num_heads", "head_size", "scale", "num_kv_heads", "prefix")
CALLED_WITH = ("query", "key", "value", "cu_seqlens", "max_seqlen", "sequence_lengths")
CLASS_METHODS = {"compute_max_seqlen", "maybe_compute_seq_lens", "maybe_recompute_cu_seqlens"}
READ = {"is_flash_attn_backend"}


def unseen(source: str) -> list[str]:
    """What a file of vLLM does with the attention that this one does not know of."""
    tree = ast.parse(source)
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    found = [
        f"{ast.unparse(parents[node])} of the name"
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == NAME and not _is_known_use(node, parents)
    ]
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        found += _unseen_in(cls, parents)
    return found


def _is_known_use(node: ast.Name, parents: dict[ast.AST, ast.AST]) -> bool:
    parent = parents[node]
    match parent:
        case ast.Call(func=func) if func is node:
            return _is_known_call(parent, MADE_WITH)
        case ast.Attribute(attr=name):
            return name in CLASS_METHODS and isinstance(parents[parent], ast.Call)
        case ast.ClassDef(name=name):
            return name in SUBCLASSES
        case ast.keyword(arg=name):
            return name == "attn_cls"
        case ast.Compare():
            return ast.unparse(parent) == f"attn_cls == {NAME}"
        case ast.Subscript() | ast.arg():  # annotations
            return True
    return False


def _unseen_in(cls: ast.ClassDef, parents: dict[ast.AST, ast.AST]) -> Iterator[str]:
    attributes = {
        target.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        if isinstance(node.value.func, ast.Name) and node.value.func.id in CLASSES
        for target in node.targets
        if isinstance(target, ast.Attribute)
    }
    called = set()
    for node in ast.walk(cls):
        if not isinstance(node, ast.Attribute) or node.attr not in attributes or isinstance(node.ctx, ast.Store):
            continue
        parent = parents[node]
        if isinstance(parent, ast.Call) and parent.func is node:
            called.add(node.attr)
            if not _is_known_call(parent, CALLED_WITH):
                yield f"{cls.name}: {ast.unparse(parent)}"
        elif not ((isinstance(parent, ast.Attribute) and parent.attr in READ) or isinstance(parent, ast.Compare)):
            yield f"{cls.name}: {ast.unparse(parent)}"
    yield from (f"{cls.name}: {name} is never called" for name in attributes - called)


def _is_known_call(call: ast.Call, names: tuple[str, ...]) -> bool:
    # A starred one could be anything.
    positional = not any(isinstance(argument, ast.Starred) for argument in call.args) and len(call.args) <= len(names)
    return positional and all(keyword.arg in names[len(call.args) :] for keyword in call.keywords)


MODEL = """
class Layer(nn.Module):
    def __init__(self):
        self.attn = {made}

    def forward(self, q, k, v, cu):
        return {called}
"""
MADE, CALLED = f"{NAME}(2, 64, scale=1.0)", "self.attn(q, k, v, cu_seqlens=cu)"


def test_the_known_conventions_are_known() -> None:
    assert unseen(MODEL.format(made=MADE, called=CALLED)) == []


@pytest.mark.parametrize(
    ("made", "called"),
    [
        (f"{NAME}(2, 64, window=8)", CALLED),
        (f"{NAME}(*sizes)", CALLED),
        (f"{NAME}(2, 64, **options)", CALLED),
        (f"{NAME}(2, 64, num_heads=2)", CALLED),
        (f"make({NAME}, 2, 64)", CALLED),
        (f"{NAME}.packed(2, 64)", CALLED),
        (MADE, "self.attn(q, k, v, attention_mask=cu)"),
        (MADE, "self.attn(q, k, v, cu, None, None, cu)"),
        (MADE, "self.attn(*qkv)"),
        (MADE, "self.attn(q, k, v, **metadata)"),
        (MADE, "self.attn.forward_cuda(q, k, v)"),
        (MADE, "run(self.attn, q, k, v)"),
        (MADE, "q"),
    ],
)
def test_a_new_convention_is_noticed(made: str, called: str) -> None:
    assert unseen(MODEL.format(made=made, called=called))


def test_a_new_subclass_is_noticed() -> None:
    assert unseen(f"class Windowed({NAME}):\n    pass")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_vllm_uses_its_attention_as_we_know_it() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    sources = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    using = {name: source for name, source in sources.items() if any(of in source for of in {NAME, *SUBCLASSES})}
    # It offers both to the rest.
    del using["model_executor/layers/attention/__init__.py"]
    # Fewer would mean that the walk looks in the wrong place.
    assert len(using) > 40
    assert {name: found for name, source in using.items() if (found := unseen(source))} == {}


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_the_class_takes_what_we_know() -> None:
    from vllm.model_executor.layers.attention import MMEncoderAttention

    assert tuple(inspect.signature(MMEncoderAttention.__init__).parameters) == ("self", *MADE_WITH)
    for platform in ("native", "cuda", "cpu", "xpu"):
        method = getattr(MMEncoderAttention, f"forward_{platform}")
        assert tuple(inspect.signature(method).parameters) == ("self", *CALLED_WITH)
