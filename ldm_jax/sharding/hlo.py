"""What a compiled program moves, read from its text (`compiled.as_text()`): collectives by kind, and bytes of main memory.

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop runs, where its trip count is known.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_SHAPE = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^{}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
# Between slices XLA:TPU sends through the hosts: a program is one slice's, and its devices are numbered within that.
_MEGASCALE = re.compile(r'_xla_megascale_target="\{([\d,]+)\}.*_xla_megascale_transfer_type="(\w+)"')
# XLA:TPU may run a collective beside other work: each fusion of that work names the collective again, and hands its buffers on to the next.
_CHAIN = re.compile(r'channel_id=(\d+),.*chain_id="\d+"')
_BITS = re.compile(r"(\d+)")
_NO_TRAFFIC = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "after-all"}
_NO_TRAFFIC |= {"partition-id", "replica-id", "opt-barrier", "async-start", "async-done"}


class Instruction(NamedTuple):
    """`shape` is as written, a tuple's in parentheses; `rest` is what follows the operands, of a constant its value."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: of `KINDS`. An all-reduce that XLA:TPU fused with the slicing of its result is a reduce-scatter.
      shape: of its result, as XLA writes it, without layouts.
      bytes: of the larger one of its operands and results, on one device.
      groups: [number, size], the devices that talk to each other, by their places in the mesh; between slices, the first of each.
      times: how often it runs in one execution.
    """

    kind: str
    shape: str
    bytes: int
    groups: np.ndarray
    times: int

    @property
    def traffic(self) -> float:
        """Bytes that leave a device in one execution, by the bandwidth-optimal algorithm for a group of n:
        (n - 1) / n of them, twice that for an all-reduce, and all of them for a permutation."""
        n = self.groups.shape[1]
        share = 1.0 if self.kind == "collective-permute" else (n - 1) / n
        return self.times * self.bytes * share * (2 if self.kind == "all-reduce" else 1)

    def crosses(self, slice_size: int) -> bool:
        """Whether devices of several slices talk, each of `slice_size` that follow each other."""
        return bool((self.groups // slice_size != self.groups[:, :1] // slice_size).any())


class Program:
    """The text of a compiled program as instructions by computation."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations.setdefault(match[2], [])
                self.entry = match[2] if match[1] else self.entry
            elif current is not None and (instruction := _parse(line)):
                current.append(instruction)
        count = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
        self.devices = int(count[1]) if count else 1

    def collectives(self) -> list[Collective]:
        """All of them, in no order."""
        found: list[Collective] = []
        chained: set[str] = set()
        for name, times, _ in self._visited():
            talking = [n for n in self.computations[name] if n.op.removesuffix("-start") in KINDS]
            sending = [(n, sent) for n in self.computations[name] if n.op == "send" and (sent := _MEGASCALE.search(n.rest))]
            shapes = {n.name: n.shape for n in self.computations[name]} if talking or sending else {}
            for n, sent in sending:
                slices = len(sent[1].split(","))
                groups = np.arange(slices)[None] * self.devices
                kind, shape = sent[2].lower().replace("_", "-"), shapes.get(n.operands[0], "")
                found.append(Collective(kind, re.sub(r"\{[^{}]*\}", "", shape), shape_bytes(shape), groups, times))
            for n in talking:
                if chain := _CHAIN.search(n.rest):
                    if chain[1] in chained:
                        continue
                    chained.add(chain[1])
                kind = n.op.removesuffix("-start")
                given = sum(shape_bytes(shapes.get(operand, "")) for operand in n.operands)
                made = shape_bytes(n.shape) - (given if _has_operands(n) else 0)
                fused = kind == "all-reduce" and name.startswith("all-reduce-scatter")
                plain = re.sub(r"\{[^{}]*\}", "", n.shape)
                found.append(Collective("reduce-scatter" if fused else kind, plain, max(given, made), self._groups(n), times))
        return found

    def memory_bytes(self) -> int:
        """Bytes that one execution reads from and writes to main memory, as each fusion, product and copy reads its operands and writes
        its results once; what lies in the vector memory of a TPU is left out."""
        total = 0
        for name, times, control in self._visited():
            if control:
                shapes = {n.name: n.shape for n in self.computations[name]}
                for n in self.computations[name]:
                    if n.op not in _NO_TRAFFIC and not n.op.endswith("-done"):
                        total += times * self._moved(n, [shapes.get(operand, "") for operand in n.operands])
        return total

    def _moved(self, n: Instruction, operands: Sequence[str]) -> int:
        """Bytes of main memory that an instruction reads and writes, given the shapes of its operands."""
        made = _parts(n.shape)
        if n.op == "slice-start":  # it makes (operand, slice, context), and touches no more of the operand than the slice
            piece = made[len(operands)]
            return shape_bytes(piece) * sum(shape_bytes(each, main_memory=True) > 0 for each in (operands[0], piece))
        read = [] if _has_operands(n) else list(operands)
        for result, operand in self._handed_on(n):
            made[result] = read[operand] = ""  # of no bytes
        return sum(shape_bytes(each, main_memory=True) for each in (*read, *made))

    def _handed_on(self, n: Instruction) -> list[tuple[int, int]]:
        """(part of the result, operand) of a fusion that a collective runs beside, where both are one buffer: those of the collective."""
        called = re.search(r"calls=%?([\w.-]+)", n.rest)
        inside = self.computations.get(called[1], []) if n.op == "fusion" and called else []
        if not any(_CHAIN.search(each.rest) for each in inside):
            return []
        return [(int(result or 0), int(operand)) for result, operand in re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", n.rest)]

    def _visited(self) -> Iterator[tuple[str, int, bool]]:
        """Computations, how often each runs, and whether its instructions stand on their own rather than in a fusion."""
        pending = [(self.entry, 1, True)]
        while pending:
            name, times, control = pending.pop()
            if name not in self.computations:
                continue
            yield name, times, control
            for n in self.computations[name]:
                for key, called in re.findall(r"\b(body|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.-]+)", n.rest):
                    runs = times * self._trips(n) if key == "body" else times
                    if key == "to_apply" and n.op != "call":
                        continue  # what a reduction or a collective applies
                    pending += [(each, runs, control and n.op != "fusion") for each in re.findall(r"[\w.-]+", called)]

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: as XLA says, or by its condition, a counter below a constant; 1 where neither tells."""
        if said := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(said[1])
        name = re.search(r"condition=%?([\w.-]+)", loop.rest)
        condition = self.computations.get(name[1], []) if name else []
        limits = {n.name: int(value[1]) for n in condition if n.op == "constant" and (value := re.fullmatch(r"\((\d+)\)", n.rest))}
        below = [n for n in condition if n.op == "compare" and "direction=LT" in n.rest]
        return limits.get(below[0].operands[-1], 1) if len(below) == 1 else 1

    def _groups(self, instruction: Instruction) -> np.ndarray:
        """[number, size]: places in the mesh of the devices that talk to each other."""
        if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", instruction.rest):
            return np.array([[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])])
        listed = re.search(r"replica_groups=(\{\{.*?\}\}|\{\})", instruction.rest)
        if listed:
            groups = [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
            return np.array(groups or [[*range(self.devices)]])
        if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", instruction.rest):
            return _iota(iota[3]).reshape(int(iota[1]), int(iota[2]))
        mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\))\))? \{(.*?)\}", instruction.rest)
        if not mesh:
            return np.arange(self.devices)[None]
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = (_iota(mesh[2]) if mesh[2] else np.arange(math.prod(axes.values()))).reshape(tuple(axes.values()))
        talking = re.findall(r"'(\w+)'", mesh[3])
        names = list(axes)
        order = [names.index(n) for n in names if n not in talking] + [names.index(n) for n in talking]
        return ids.transpose(order).reshape(-1, math.prod(axes[n] for n in talking))


def _has_operands(instruction: Instruction) -> bool:
    """Whether the shape of the result is of the operands and the results together, as that of a start is."""
    return instruction.op.endswith("-start") and instruction.op != "all-reduce-start"


def _parts(shape: str) -> list[str]:
    """A tuple's shapes, of tuples in it too, as they are written; or the one shape."""
    return [match[0] for match in _SHAPE.finditer(shape)]


def _iota(text: str) -> np.ndarray:
    """Numbers as XLA abbreviates them: "[32,8]T(1,0)" counts in a table of that shape, and reads it transposed."""
    shape = [int(n) for n in re.search(r"\[([\d,]+)\]", text)[1].split(",")]  # type: ignore[index]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    transposed = re.search(r"T\(([\d,]+)\)", text)
    return numbers.transpose([int(n) for n in transposed[1].split(",")]) if transposed else numbers


def shape_bytes(shape: str, main_memory: bool = False) -> int:
    """Bytes of a shape as XLA writes it, of a tuple's parts together; `main_memory` leaves out what is placed elsewhere."""
    total = 0
    for kind, dims, layout in _SHAPE.findall(shape):
        if main_memory and re.search(r"S\([1-9]", layout):
            continue
        if kind in ("token", "opaque"):
            continue
        width = _BITS.search(kind)
        bits = 8 if kind.startswith("f8") or width is None else int(width[1])
        total += math.prod(int(n) for n in dims.split(",") if n) * bits // 8
    return total


def _parse(line: str) -> Instruction | None:
    name, equals, right = line.strip().removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    shape, right = _balanced(right) if right.startswith("(") else right.split(" ", 1)
    op, parenthesis, right = right.strip().partition("(")
    if not parenthesis:
        return None
    operands, rest = _balanced("(" + right)
    return Instruction(name.lstrip("%"), shape, op, tuple(re.findall(r"%([\w.-]+)", operands)), operands if op == "constant" else rest)


def _balanced(text: str) -> tuple[str, str]:
    """A text that begins with a parenthesis, divided where that closes."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: place + 1], text[place + 1 :]
    return text, ""
