"""PTX text to instructions."""

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction of a kernel.

    Attributes:
        opcode: with all modifiers, "add.rn.f32".
        operands: as written; the destination first where there is one.
        predicate: the register that guards it, "" without one.
        negated: it runs where the predicate is false.
        where: source line, "file.py:12", then " in " the lines that it was inlined from.
        text: as written.
        line: of the PTX text, from 1.
    """

    opcode: str
    operands: tuple[str, ...]
    predicate: str
    negated: bool
    where: str
    text: str
    line: int

    @property
    def parts(self) -> list[str]:
        """The opcode's components."""
        return self.opcode.split(".")


class Module(NamedTuple):
    """The one kernel of a PTX text.

    Attributes:
        name: of the entry.
        parameters: (name, type), in order.
        registers: name -> type, "b32" or "pred".
        instructions: in order.
        labels: name -> index of the instruction that follows.
    """

    name: str
    parameters: tuple[tuple[str, str], ...]
    registers: dict[str, str]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)[^{]*\{", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,\n]*?\s([\w$]+)\s*(?:,|$)", re.MULTILINE)
_LOCATION = re.compile(r"\s*\.loc\s+(\d+) (\d+) \d+(?:.*?//\s*([\w.<>-]+:\d+)(.*))?")
_INLINED_AT = re.compile(r"@\[ ([\w.<>-]+:\d+)")
_LABEL = re.compile(r"([\w$]+):")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
_NUMBERED = re.compile(r"(.*)<(\d+)>$")
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)")


def parse(ptx: str) -> Module:
    """Parse a text with one kernel.

    Raises:
        ValueError: the text has no entry.
    """
    entry = _ENTRY.search(ptx)
    if not entry:
        raise ValueError("ptx: expected a text with an .entry")
    parameters = tuple((name, kind) for kind, name in _PARAMETER.findall(entry[2]))
    body = _Body()
    first = ptx.count("\n", 0, entry.end()) + 1
    for number, line in enumerate(ptx[entry.end() :].split("\n"), first):
        if ".section" in line:
            break
        body.add(number, line)
    return Module(entry[1], parameters, body.registers, tuple(body.instructions), body.labels)


class _Body:
    """The text between the braces of an entry, statement by statement."""

    def __init__(self) -> None:
        self.registers: dict[str, str] = {}
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.where = ""
        self.pending = ""
        self.scopes: list[dict[str, str]] = []  # names that a nested { } declares -> unique ones
        self.renamed = 0

    def add(self, number: int, line: str) -> None:
        if location := _LOCATION.match(line):
            file, row, source, inlined = location.groups()
            lines = [source, *_INLINED_AT.findall(inlined)] if source else [f"file {file}:{row}"]
            self.where = " in ".join(lines)
            return
        self.pending = f"{self.pending} {line.partition('//')[0]}".lstrip()
        while self.pending and self._take(number):
            pass

    def _take(self, number: int) -> bool:
        """Take a label, a brace or a statement off the pending text; False when its end is still to come."""
        text = self.pending
        if text[0] == "{":
            self.scopes.append({})
            self.pending = text[1:].lstrip()
        elif text[0] == "}":
            if self.scopes:
                self.scopes.pop()
            self.pending = text[1:].lstrip()
        elif label := _LABEL.match(text):
            self.labels[label[1]] = len(self.instructions)
            self.pending = text[label.end() :].lstrip()
        elif ";" in text:
            statement, _, rest = text.partition(";")
            self.pending = rest.lstrip()
            self._statement(number, " ".join(statement.split()))
        else:
            return False
        return True

    def _statement(self, number: int, statement: str) -> None:
        if declared := _REGISTERS.match(statement):
            for name in declared[2].split(","):
                self._declare(name.strip(), declared[1])
        elif statement and not statement.startswith("."):
            negated, predicate, opcode, operands = _INSTRUCTION.match(self._rename(statement)).groups()  # type: ignore[union-attr]
            self.instructions.append(
                Instruction(
                    opcode, split_operands(operands), predicate or "", bool(negated), self.where, statement, number
                )
            )

    def _declare(self, name: str, kind: str) -> None:
        if numbered := _NUMBERED.match(name):
            self.registers |= {f"{numbered[1]}{i}": kind for i in range(int(numbered[2]))}
        elif self.scopes:
            self.renamed += 1
            self.scopes[-1][name] = f"{name}${self.renamed}"
            self.registers[self.scopes[-1][name]] = kind
        else:
            self.registers[name] = kind

    def _rename(self, text: str) -> str:
        for names in reversed(self.scopes):
            for name, unique in names.items():
                text = re.sub(rf"(?<![\w%.$]){re.escape(name)}(?![\w$])", unique, text)
        return text


def split_operands(text: str) -> tuple[str, ...]:
    """Split at the commas that lie in no brackets."""
    operands, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            operands.append(text[start:i].strip())
            start = i + 1
    rest = text[start:].strip()
    return (*operands, rest) if rest else tuple(operands)


def vector(operand: str) -> list[str]:
    """The registers of "{a, b}", or the one operand itself."""
    return [part.strip() for part in operand.strip("{} ").split(",")]
