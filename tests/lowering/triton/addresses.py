"""Which 32-bit integers of a compiled Triton kernel may overflow on their way into an address.

A table of 2**31 numbers or more needs the products of slots and row lengths in 64 bits; no test on a small table shows
that. So every integer of the kernel is bounded, from what may be assumed of its arguments up, on the text of its TTIR.
Tried on Triton 3.6, 3.7 and 3.9.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from tests.lowering.triton.offline import Compiled
from tests.lowering.triton.ranges import ARITHMETIC, PASSED_ON, UNSIGNED, Range
from tests.lowering.triton.ttir_text import element, result_type, results, split_types


def overflowing_offsets(
    compiled: Compiled,
    tables: Iterable[str],
    largest: Mapping[str, int] | None = None,
    *,
    products_only: bool = False,
) -> list[str]:
    """The 32-bit operations of the offsets into `tables` whose result may not fit; none where every address is right.

    Args:
        compiled: the kernel.
        tables: pointer arguments, by their names in the kernel.
        largest: bounds, inclusive, by name: of an integer argument; of the integers behind a pointer argument; of
            ``"program_id(0)"``. Without one an integer is bounded by its type, and ``program_id(1)`` and ``(2)`` by
            what can be launched (65,534). All of these are taken to be at least 0.
        products_only: report products and shifts alone: where a row's length comes in.

    Returns:
        A line ``table: operation`` each. It errs to the safe side: masks bound nothing, and a sum that a loop carries
        counts as unbounded.

    Raises:
        ValueError: no address is computed from one of `tables`, or the kernel has control flow that this file does not
            know (`return` inside a branch, functions that are not inlined).
    """
    program = _Program(compiled.asm["ttir"], largest or {})
    bounds = program.bounds()
    faults: dict[str, None] = {}
    unused = set(tables)
    for node in [node for node in program.nodes if node.operation == "tt.addptr"]:
        pointer, offset = node.operands
        reached = program.arguments_of(pointer) & {*tables}
        unused -= reached
        for cause in program.narrow_causes(offset):
            if products_only and cause.operation not in ("arith.muli", "arith.shli"):
                continue
            if cause.exact_bounds(bounds, program) not in Range.of(cause.bits):
                faults |= {f"{table}: {cause.text}": None for table in sorted(reached)}
    if unused:
        raise ValueError(f"{compiled.name}: no address is computed from {sorted(unused)}")
    return list(faults)


# --- The program ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Node:
    """One value: an argument of the kernel, an operation's result, or what a loop or a branch hands on (`join`)."""

    operation: str
    operands: list[_Node]
    dtype: str  # of an element: i32, bf16, !tt.ptr<...>
    text: str
    fixed: Range | None = None  # known without the operands

    @property
    def bits(self) -> int:
        """Width of an integer; 0 for everything else."""
        if self.dtype == "index":
            return 64
        return int(self.dtype[1:]) if re.fullmatch(r"i\d+", self.dtype) else 0

    def exact_bounds(self, bounds: Mapping[_Node, Range], program: _Program) -> Range:
        """What the result would be if integers had no end."""
        if self.fixed is not None:
            return self.fixed
        if self.operation == "tt.load":
            return program.loaded(self)
        operands = self.operands[self.operation == "arith.select" :]  # a select's first one is its condition
        known = [bounds[operand] for operand in operands if operand in bounds]
        if self.operation in UNSIGNED and any(value.low < 0 for value in known):
            return Range(0, (1 << max(operand.bits for operand in operands)) - 1)
        if self.operation == "scf.for":
            low, high = known
            return Range(low.low, max(low.low, high.high - 1))
        if self.operation in ARITHMETIC:
            return ARITHMETIC[self.operation](*known)
        if self.operation in PASSED_ON and known:
            return Range(min(value.low for value in known), max(value.high for value in known))
        return Range.of(self.bits)


@dataclasses.dataclass
class _Region:
    """An operation whose body is being read.

    Attributes:
        operation: its name; ``before`` for the condition of an `scf.while`.
        results: what the values of its terminator reach.
        carried: what the body of an `scf.while` hands to the next turn.
        adds: a reduction or a scan that does more than choose.
    """

    operation: str
    results: list[_Node] = dataclasses.field(default_factory=list)
    carried: list[_Node] = dataclasses.field(default_factory=list)
    adds: bool = False


_NAME = r"%[\w$.\-]+"
_LOCATION = re.compile(r"\s*\bloc\((?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*\)")


class _Program:
    """The integers and pointers of a kernel, read line by line.

    MLIR lets a name come again in a sibling region, never in a nested one: the last definition is the one meant.
    """

    def __init__(self, ttir: str, largest: Mapping[str, int]) -> None:
        self.nodes: list[_Node] = []
        self._arguments: dict[_Node, str] = {}
        self._largest = largest
        self._named: dict[str, _Node] = {}
        self._regions: list[_Region] = []
        for line in ttir.splitlines():
            self._read(_LOCATION.sub("", line).strip())

    def bounds(self) -> dict[_Node, Range]:
        """A range for each integer. What still grows after a few turns of a loop may be anything of its type."""
        bounds: dict[_Node, Range] = {}
        for turn in range(20):
            before = dict(bounds)
            for node in self.nodes:
                if not node.bits or not self._is_ready(node, bounds):
                    continue
                limit = Range.of(node.bits)
                exact = node.exact_bounds(bounds, self)
                new = exact if exact in limit else limit
                if node in bounds and new not in bounds[node]:
                    new = limit if turn > 3 and node.operation == "join" else new | bounds[node]
                elif node in bounds:
                    continue
                bounds[node] = new
            if bounds == before:
                return bounds
        raise ValueError("the ranges of this kernel's integers do not settle")

    @staticmethod
    def _is_ready(node: _Node, bounds: Mapping[_Node, Range]) -> bool:
        if node.fixed is not None:
            return True
        integers = [operand in bounds for operand in node.operands if operand.bits]
        return any(integers) if node.operation == "join" else all(integers)

    def loaded(self, node: _Node) -> Range:
        """What lies behind the pointers of a load, and what it gives where its mask is off."""
        high = Range.of(node.bits).high
        known = [self._largest.get(name, high) for name in self.arguments_of(node.operands[0])]
        bounds = Range(0, max(known, default=high))
        for other in node.operands[2:]:
            bounds |= other.fixed or Range.of(node.bits)
        return bounds

    def arguments_of(self, pointer: _Node) -> set[str]:
        """The kernel arguments that a pointer may come from."""
        sources = _backwards(pointer, lambda node: "ptr" in node.dtype)
        return {self._arguments[node] for node in sources if node in self._arguments}

    def narrow_causes(self, offset: _Node) -> Iterator[_Node]:
        """The computations in 32 bits or fewer that an offset comes from, up to what was loaded or compared."""
        for node in _backwards(offset, lambda node: node.bits > 1 and node.operation != "tt.load"):
            if node.bits <= 32 and (node.operation in ARITHMETIC or node.operation == "arith.trunci"):
                yield node

    # One line

    def _read(self, line: str) -> None:
        if line.startswith("tt.func"):
            if self._arguments:
                raise ValueError("a kernel that calls functions is not understood")
            self._read_arguments(line)
        elif line.startswith("cf."):
            raise ValueError(f"control flow that is not understood: {line}")
        elif line.startswith(("scf.yield", "scf.condition")):
            self._read_terminator(line)
        elif line.startswith("}"):
            self._read_end(line)
        elif line.startswith("^"):
            self._read_block(line)
        elif line.startswith("%") and " = " in line:
            left, _, right = line.partition(" = ")
            self._read_operation(results(left), right, line)
        elif line.endswith("{"):
            self._read_operation([], line, line)

    def _define(self, name: str, node: _Node) -> _Node:
        self._named[name] = node
        self.nodes.append(node)
        return node

    def _uses(self, text: str) -> list[_Node]:
        return [self._named[name] for name in re.findall(rf"{_NAME}(?:#\d+)?", text)]

    def _read_arguments(self, line: str) -> None:
        for name, dtype in re.findall(rf"({_NAME}): (!tt\.ptr<[^{{}},]*>|[^\s,{{)]+)", line):
            node = self._define(name, _Node("argument", [], dtype, name))
            self._arguments[node] = name[1:]
            if node.bits > 1:
                node.fixed = Range(0, self._largest.get(name[1:], Range.of(node.bits).high))

    def _read_operation(self, results: list[str], right: str, line: str) -> None:
        operation = right.split()[0].split("(")[0].strip('"')
        if operation == "scf.for":
            self._open_for(results, right)
        elif operation in ("scf.if", "scf.while"):
            self._open_branch(operation, results, right)
        elif right.endswith("({"):  # a reduction or a scan: how it combines is read until its end
            made = [
                self._define(result, _Node(operation, [operand], operand.dtype, line))
                for result, operand in zip(results, self._uses(right), strict=True)
            ]
            self._regions.append(_Region(operation, made))
        elif right.endswith("{"):
            self._regions.append(_Region(operation))
        else:
            values, _, types = right.rpartition(" : ")
            node_type = result_type(operation, types)
            for result in results:
                node = _Node(operation, self._uses(values), node_type, line, self._known(operation, right))
                self._define(result, node)
            if self._regions and operation in ("arith.addi", "arith.subi", "arith.muli"):
                self._regions[-1].adds = True

    def _known(self, operation: str, text: str) -> Range | None:
        if operation == "arith.constant":
            match = re.search(r"arith\.constant (?:dense<)?(-?\d+|true|false)>? :", text + " :")
            if match is None:
                return None
            value = {"true": 1, "false": 0}.get(match.group(1))
            value = int(match.group(1)) if value is None else value
            return Range(value, value)
        if operation == "tt.make_range":
            ends = dict(re.findall(r"(start|end) = (\d+)", text))
            return Range(int(ends["start"]), int(ends["end"]) - 1)
        if operation in ("tt.get_program_id", "tt.get_num_programs"):
            axis = "xyz".index(text.split()[1])
            last = self._largest.get(f"program_id({axis})", 2**31 - 2 if axis == 0 else 65_534)
            return Range(0, last + (operation == "tt.get_num_programs"))
        return None

    # Regions

    def _open_for(self, results: list[str], right: str) -> None:
        head = re.match(rf"scf\.for (?:unsigned )?({_NAME}) = (\S+) to (\S+) step", right)
        if head is None:
            raise ValueError(f"a loop that is not understood: {right}")
        name, low, high = head.group(1), *(self._named[head.group(index)] for index in (2, 3))
        self._define(name, _Node("scf.for", [low, high], low.dtype, right))
        carried = self._carried(right, "iter_args")
        self._named |= dict(zip(results, carried, strict=True))
        self._regions.append(_Region("scf.for", carried))

    def _open_branch(self, operation: str, results: list[str], right: str) -> None:
        carried = self._carried(right, "scf.while ") if operation == "scf.while" else []
        types = re.search(r"-> \(?(.*?)\)? (?:attributes .*)?\{$", right)
        made = [
            self._define(result, _Node("join", [], element(dtype), f"{result} = {right}"))
            for result, dtype in zip(results, split_types(types.group(1)) if types else [], strict=False)
        ]
        if operation == "scf.while":
            self._regions.append(_Region(operation, made, carried))
            self._regions.append(_Region("before"))
        else:
            self._regions.append(_Region(operation, made))

    def _carried(self, right: str, keyword: str) -> list[_Node]:
        pairs = re.search(rf"{keyword}\((.*?)\)", right)
        joins = []
        for name, initial in re.findall(rf"({_NAME}) = ({_NAME}(?:#\d+)?)", pairs.group(1)) if pairs else []:
            first = self._named[initial]
            joins.append(self._define(name, _Node("join", [first], first.dtype, f"{name} of {right}")))
        return joins

    def _read_terminator(self, line: str) -> None:
        values, region = self._uses(line.partition(" : ")[0]), self._regions[-1]
        if line.startswith("scf.condition"):
            values, receivers = values[1:], self._regions[-2].results
        else:
            receivers = region.carried if region.operation == "scf.while" else region.results
        for receiver, value in zip(receivers, values, strict=True):
            receiver.operands.append(value)

    def _read_end(self, line: str) -> None:
        if line.startswith("} else {") or not self._regions:
            return
        region = self._regions.pop()
        if line.startswith("})") and not region.adds:
            for result in region.results:  # a maximum, or where it is: one of the numbers that went in
                result.operation = "join"

    def _read_block(self, line: str) -> None:
        region = self._regions[-1] if self._regions else _Region("")
        for index, (name, dtype) in enumerate(re.findall(rf"({_NAME}): ((?:[^,<)]|<[^>]*>+)+)", line)):
            if region.operation == "scf.while":
                self._named[name] = region.results[index]
            else:
                self._define(name, _Node("block argument", [], element(dtype), line))


def _backwards(start: _Node, follow: Callable[[_Node], bool]) -> Iterator[_Node]:
    """`start` and all that it is computed from, through nodes that `follow` accepts."""
    seen: set[_Node] = set()
    left = [start]
    while left:
        node = left.pop()
        if node not in seen and follow(node):
            seen.add(node)
            left += node.operands
            yield node
