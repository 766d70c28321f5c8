"""Reads the text of a kernel in PTX.

Source: PTX ISA 9.0, sections "Syntax", "State Spaces, Types, and Variables" and "Instruction Operands".
"""

import re
from dataclasses import dataclass, field

from .faults import Fault

ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", re.S)
LABEL = re.compile(r"^([$\w]+):(?!:)\s*")
SCOPE = re.compile(r"\{(\s*\.reg.*\})?$")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([%\w]+)(?:<\d+>)?$")
GUARD = re.compile(r"@(!?)(%\w+)\s+")
LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+.*?(?://\s*(.*))?$")
# Names that look like registers but cannot be written.
SPECIAL = re.compile(r"%(tid|ctaid|nctaid|ntid|laneid)\b")
# The type of a parameter that is a tensor map.
MAP = "map"
# Directives that do not affect what a kernel computes.
SILENT = (".pragma", ".file", ".loc")
# Opcodes whose first operand is not a destination, except for a few of their forms.
WITHOUT_RESULT = {"st", "cp", "bra", "bar", "ret", "fence", "wgmma", "stmatrix", "trap", "tcgen05", "mbarrier"}
WITH_RESULT = "tcgen05.ld.", "mbarrier.try_wait."


@dataclass(slots=True)
class Instruction:
    """operands: strings; a vector is a tuple of its elements. guard: (register, negated), or None.

    touched: the result of `effects`.
    """

    opcode: str
    operands: tuple
    guard: tuple | None
    line: int
    source: str
    touched: tuple | None = None

    @property
    def base(self):
        return self.opcode.split(".", 1)[0]


@dataclass
class Kernel:
    """params: (name, type). registers: the type of each, by name or by the letters that its name starts with."""

    name: str
    params: list
    threads: int
    registers: dict = field(default_factory=dict)
    symbols: set = field(default_factory=set)
    code: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)

    def type_of(self, register):
        """The type that a register is declared with, such as "b32"."""
        found = self.registers.get(register) or self.registers.get(register.rstrip("0123456789"))
        if found is None:
            raise Fault("instruction", f"undeclared register {register}", self.name)
        return found


def split(text):
    """Operands, split at the commas outside brackets."""
    operands, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            operands.append(text[start:i])
            start = i + 1
    operands.append(text[start:])
    return tuple(operand(part.strip()) for part in operands if part.strip())


def operand(text):
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    return text


def registers_of(part):
    """The registers of an operand: a vector, a pair a|b, an address, a place in a tensor or a single register."""
    if isinstance(part, tuple):
        return [name for one in part for name in registers_of(one)]
    if "%" not in part:
        return []
    return [name for name in re.findall(r"%\w+", part) if not SPECIAL.match(name)]


def effects(instruction):
    """(registers read, registers written)."""
    if instruction.touched is None:
        instruction.touched = read_and_written(instruction)
    return instruction.touched


def read_and_written(instruction):
    operands = instruction.operands
    if instruction.base == "wgmma" and operands and isinstance(operands[0], tuple):
        accumulators = list(operands[0])
        return accumulators + [name for part in operands[1:] for name in registers_of(part)], accumulators
    has_result = instruction.base not in WITHOUT_RESULT or instruction.opcode.startswith(WITH_RESULT)
    written = registers_of(operands[0]) if has_result and operands else []
    read = [name for part in operands[has_result:] for name in registers_of(part)]
    if instruction.guard:
        read = [*read, instruction.guard[0], *written]  # a register that is not written keeps its value
    return read, written


def parameter(words):
    """(name, type) of a parameter."""
    if found := re.fullmatch(r"\.param \.align (?:64|128) \.b8 (\w+)\[128\]", " ".join(words)):
        return found[1], MAP
    return words[-1], words[1].lstrip(".")


def header(text):
    """(kernel without code, position where its code starts)."""
    entry = ENTRY.search(text)
    if entry is None or len(ENTRY.findall(text)) != 1:
        raise Fault("instruction", "a text without exactly one kernel")
    params = [parameter(part.split()) for part in entry[2].split(",") if part.strip()]
    # How many registers ptxas may use does not affect what a kernel computes.
    threads = re.fullmatch(r"\.reqntid\s+(\d+)(?:,\s*1)*(?:\s*\.maxnreg\s+\d+)?", entry[3].strip())
    if threads is None:
        raise Fault("instruction", f"threads of a program: {entry[3].strip()}", entry[1])
    kernel = Kernel(entry[1], params, int(threads[1]))
    for name, size in re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d*)\]", text):
        if size or kernel.symbols:
            raise Fault("instruction", f"shared memory {name} besides the one block of unknown size", kernel.name)
        kernel.symbols.add(name)
    return kernel, entry.end()


def parse(text):
    """A Kernel."""
    kernel, start = header(text)
    number, source, scopes = text.count("\n", 0, start), "?", []
    lines = text[start:].split("\n")
    for k, line in enumerate(lines):
        number += 1
        code = line.split("//")[0].strip()
        if place := LOCATION.search(line):
            source = place[3] or f"file {place[1]}:{place[2]}"
        if code == "}" and not scopes:
            return kernel
        if SCOPE.match(code):
            scopes.append(own_names(lines[k:], f"_{number}"))
            code = code[1:]
        for names in reversed(scopes):
            for name, own in names.items():
                code = re.sub(rf"(?<![.%$\w]){re.escape(name)}\b", own, code)
        if scopes and code.endswith("}"):
            scopes.pop()
            code = code[:-1]
        for statement in filter(None, (part.strip() for part in code.split(";"))):
            read(kernel, statement, number, source)
    raise Fault("instruction", "a kernel without an end", kernel.name)


def own_names(lines, suffix):
    """The registers and labels of a scope that starts here, and their names in the kernel.

    Their names in the scope have no %. Several scopes of a kernel may use the same names.
    """
    names = {}
    for line in lines:
        code = line.split("//")[0].strip()
        names |= {name: f"%{name}{suffix}" for name in re.findall(r"\.reg\s+\.\w+\s+([a-z]\w*)", code)}
        names |= {name: f"{name}{suffix}" for name in LABEL.findall(code)}
        if code.endswith("}"):
            break
    return names


def read(kernel, statement, line, source):
    """Adds one statement to the kernel."""
    if statement.startswith(SILENT):
        return
    if label := LABEL.match(statement):
        if label[1] in kernel.labels:
            raise Fault("instruction", f"two labels {label[1]}", kernel.name, None, line, source)
        kernel.labels[label[1]] = len(kernel.code)
        statement = statement[label.end() :]
        if not statement:
            return
    if found := REGISTERS.match(statement):
        kernel.registers[found[2]] = found[1]
        return
    guard = GUARD.match(statement)
    code = re.match(r"([a-z][\w.:]*)\s*(.*)", statement[guard.end() :] if guard else statement, re.S)
    if code is None:
        raise Fault("instruction", statement, kernel.name, None, line, source)
    condition = (guard[2], bool(guard[1])) if guard else None
    kernel.code.append(Instruction(code[1], split(code[2]), condition, line, source))
