"""Mutants of the Triton kernels and their launchers: every mask, stride, bound and constant changed, one at a time."""

import ast
import contextlib
import functools
import importlib.util
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import vit_kernels

MODULES = (
    "sequences",
    "strides",
    "head",
    "varlen_attention",
    "varlen_attention_backward",
    "rotary_2d",
    "pixel_shuffle",
    "layer_norm_pixel_shuffle",
    "linear_gelu",
    "eight_bit",
    "scaled_linear",
    "add_layer_norm_quantise",
    "quantise_rows",
)

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.IsNot: ast.Is,
}


@dataclass(frozen=True)
class Mutant:
    """One module with one expression changed.

    Attributes:
        module: in vit_kernels._triton.
        name: what was changed, and where: no line numbers, so that edits elsewhere leave it as it is.
        source: of the whole module.
    """

    module: str
    name: str
    source: str


@functools.cache
def mutants_of(module: str) -> tuple[Mutant, ...]:
    """All mutants of a module of vit_kernels._triton."""
    source = source_of(module)
    seen: Counter[str] = Counter()
    mutants = []
    for scope, body in _scopes(ast.parse(source)):
        for parent, node in _nodes(body):
            for replacement in _replacements(parent, node, is_launcher=scope.startswith(("launch", "_launch"))):
                name = f"{module}.{scope}: {_text(node)} -> {_text(replacement)}"
                if isinstance(node, ast.Constant):
                    name += f" in {_text(parent)[:80]}"
                seen[name] += 1
                if seen[name] > 1:
                    name += f" (number {seen[name]})"
                mutants.append(Mutant(module, name, _spliced(source, node, replacement)))
    return tuple(mutants)


def source_of(module: str) -> str:
    """The text of a module of vit_kernels._triton."""
    return (Path(vit_kernels.__file__).parent / "_triton" / f"{module}.py").read_text(encoding="utf-8")


def _scopes(tree: ast.Module) -> Iterator[tuple[str, ast.Module]]:
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            yield statement.name, ast.Module(statement.body, [])
        elif isinstance(statement, ast.Assign):
            yield "constant", ast.Module([statement], [])


def _nodes(root: ast.AST) -> Iterator[tuple[ast.AST, ast.stmt | ast.expr]]:
    """(parent, node) of every statement and expression from `root` down that does not choose block sizes."""
    if _is_tuning(root):
        return
    for child in ast.iter_child_nodes(root):
        if isinstance(child, ast.stmt | ast.expr):
            yield root, child
        yield from _nodes(child)


def _is_tuning(node: ast.AST) -> bool:
    """Whether a statement chooses block sizes: any choice is right."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(
        isinstance(name, ast.Name) and name.id.startswith("block_") for target in targets for name in ast.walk(target)
    )


def _replacements(parent: ast.AST, node: ast.AST, is_launcher: bool) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(ops=[op]) if type(op) in _COMPARISONS:
            yield ast.Compare(node.left, [_COMPARISONS[type(op)]()], node.comparators)
        case ast.BoolOp(values=[left, right]):
            yield from (left, right)
        case ast.BinOp():
            yield from _of_arithmetic(node)
        case ast.AugAssign():
            yield ast.Pass()
            if isinstance(node.op, ast.Sub):
                yield ast.AugAssign(node.target, ast.Add(), node.value)
        case ast.UnaryOp(op=ast.USub()):
            yield node.operand
        case ast.Call():
            yield from _of_call(node)
        case ast.Constant():
            yield from _of_constant(parent, node)
        case ast.Name() if isinstance(parent, ast.If):
            yield ast.UnaryOp(ast.Not(), node)
        case ast.Name(id=name, ctx=ast.Load()) if name.lower().startswith("stride_") and not is_launcher:
            yield _plus_one(node)


def _of_arithmetic(node: ast.BinOp) -> Iterator[ast.AST]:
    match node.op:
        case ast.Add() | ast.Mult() | ast.BitAnd() | ast.BitOr():
            yield from (node.left, node.right)
        case ast.Sub() | ast.FloorDiv() | ast.Mod() | ast.Div():
            yield node.left
    flipped = {ast.Add: ast.Sub, ast.Sub: ast.Add}.get(type(node.op))
    if flipped:
        yield ast.BinOp(node.left, flipped(), node.right)


def _of_call(node: ast.Call) -> Iterator[ast.AST]:
    match node.func, node.args:
        case ast.Attribute(attr="load" | "store"), _:
            if any(keyword.arg == "mask" for keyword in node.keywords):
                yield ast.Call(node.func, node.args, [k for k in node.keywords if k.arg not in ("mask", "other")])
            for keyword in node.keywords:
                if keyword.arg == "other":
                    others = [k for k in node.keywords if k is not keyword]
                    yield ast.Call(node.func, node.args, [*others, ast.keyword("other", _other_than(keyword.value))])
        case (ast.Attribute(attr="minimum" | "maximum") as function, [left, right]):
            opposite = {"minimum": "maximum", "maximum": "minimum"}[function.attr]
            yield from (left, right, ast.Call(ast.Attribute(function.value, opposite), [left, right], []))
        case ast.Name(id="max"), [left, right]:
            yield from (left, right)
        case ast.Attribute(attr="to", value=value), [ast.Attribute(attr="int64")]:
            yield value
        case ast.Attribute(attr="cdiv"), [left, right]:
            yield ast.BinOp(left, ast.FloorDiv(), right)
            yield _plus_one(node)
        case ((ast.Name(id="range") | ast.Attribute(attr="static_range")), [start, stop, step]):
            for bounds in (
                [ast.BinOp(start, ast.Add(), step), stop, step],
                [start, ast.BinOp(stop, ast.Sub(), step), step],
                [start, ast.BinOp(stop, ast.Add(), step), step],
                [start, stop, ast.BinOp(step, ast.Mult(), ast.Constant(2))],
            ):
                yield ast.Call(node.func, bounds, [])
        case ast.Name(id="range"), [stop]:
            yield ast.Call(node.func, [_plus_one(stop)], [])
            yield ast.Call(node.func, [ast.BinOp(stop, ast.Sub(), ast.Constant(1))], [])
        case ast.Attribute(attr="static_range"), [stop]:
            yield ast.Call(node.func, [ast.BinOp(stop, ast.Sub(), ast.Constant(1))], [])
        case ast.Name(id="float"), [ast.Constant()]:
            yield ast.Constant(0.0)
        case ast.Attribute(attr="where"), [_, chosen, other]:
            yield from (chosen, other)


def _other_than(value: ast.expr) -> ast.expr:
    """What a lane that is masked must not hold: NaN, or 1 where integers are read."""
    if isinstance(value, ast.Constant) and isinstance(value.value, int):
        return _plus_one(value)
    return ast.Call(ast.Name("float"), [ast.Constant("nan")], [])


def _of_constant(parent: ast.AST, node: ast.Constant) -> Iterator[ast.AST]:
    is_other = isinstance(parent, ast.keyword) and parent.arg == "other"
    match node.value:
        case bool():
            yield ast.Constant(not node.value)
        case int() if not is_other:
            yield ast.Constant(node.value + 1)
        case float() if not is_other:
            yield ast.Constant(node.value * 1.01 if node.value else 1.0)


def _plus_one(node: ast.expr) -> ast.expr:
    return ast.BinOp(node, ast.Add(), ast.Constant(1))


def _text(node: ast.AST) -> str:
    return " ".join(ast.unparse(ast.fix_missing_locations(node)).split())


def _spliced(source: str, node: ast.stmt | ast.expr, replacement: ast.AST) -> str:
    """The source with the text of one node replaced."""
    lines = source.splitlines(keepends=True)
    assert node.end_lineno is not None
    start, end = (
        sum(map(len, lines[: line - 1])) + column
        for line, column in ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset or 0))
    )
    text = _text(replacement)
    return source[:start] + (text if isinstance(node, ast.stmt) else f"({text})") + source[end:]


@contextlib.contextmanager
def installed(mutant: Mutant) -> Iterator[None]:
    """Make the launchers of vit_kernels._triton run a mutant: `vit_kernels._triton.NAME` is what imports then find.

    The modules that import the mutated one are imported afresh.
    """
    fresh = MODULES if mutant.module in ("sequences", "strides", "head", "eight_bit") else (mutant.module,)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as imports:
        for name in fresh:
            path = Path(folder) / f"{name}.py"
            path.write_text(mutant.source if name == mutant.module else source_of(name), encoding="utf-8")
            spec = importlib.util.spec_from_file_location(f"vit_kernels._triton.{name}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            imports.enter_context(_imported(spec.name, module))
            spec.loader.exec_module(module)
        yield


@contextlib.contextmanager
def _imported(name: str, module: ModuleType) -> Iterator[None]:
    # The intact module must be loaded before, with all that it imports: Triton survives no second import.
    intact = importlib.import_module(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        sys.modules[name] = intact
