"""What a step costs before it runs: FLOPs from its jaxpr, memory traffic and collectives from its compiled text.

The compilers' own figures do not do: they count the body of a loop once, know nothing of a custom kernel, and for GPUs
there are none.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from gptjax.attention import SPLASH_BLOCK


def jaxpr_flops(jaxpr: Jaxpr) -> float:
    """FLOPs of the matrix products in a program, on all devices together: what recomputes counts again.

    Products inside loops count as often as they run, inside shard_map on every device of its mesh. The norms, softmax
    and optimizer around them are left out: 0.7% of what the TPU compiler counts for two layers and the head of GPT-2.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            avals: Any = [v.aval for v in (eqn.invars[0], eqn.outvars[0])]
            (lhs, result), (axes, _) = [aval.shape for aval in avals], params["dimension_numbers"][0]
            total += 2 * math.prod(result) * math.prod(lhs[axis] for axis in axes)
        elif name == "pallas_call":
            total += _splash_flops(eqn)
        elif parts := [jaxpr_flops(part) for part in _inner(params)]:
            times = params["length"] if name == "scan" else params["mesh"].size if name == "shard_map" else 1
            total += times * (max(parts) if name == "cond" else sum(parts))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                yield part.jaxpr if isinstance(part, ClosedJaxpr) else part


def _splash_flops(eqn: Any) -> float:
    """Of splash attention by the shape of its queries [B, N, T, H]: 2 products forward, 5 in the fused backward pass.

    Blocks that the causal mask leaves out are not computed, blocks that it cuts are computed whole.
    """
    kernel = str(eqn.params.get("name") or "")
    if not kernel.startswith("splash_"):
        raise NotImplementedError(f"no count of FLOPs for the kernel {kernel!r}")
    *rows, T, H = next(v.aval.shape for v in eqn.invars if v.aval.ndim >= 3 and v.aval.dtype.kind not in "iub")
    n_blocks = T // math.gcd(T, SPLASH_BLOCK)
    products = 5 if "dkv" in kernel else 2
    return products * 2 * math.prod(rows) * T**2 * H * (n_blocks + 1) / (2 * n_blocks)


class Collective(NamedTuple):
    """One collective of the program, and how often a step runs it."""

    kind: str  # all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute
    shape: str  # of its result on a device, as the compiler writes it
    nbytes: float  # through a device's links, one way, each time: what the best algorithm cannot do without
    group: tuple[int, ...]  # places in the mesh of the devices that take part with its first one
    times: int


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """Where in the program it comes from, as JAX's names of scopes say."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *names: str) -> list[str]:
        """The computations that attributes of these names refer to."""
        found = [re.findall(rf"\b{name}=\{{?((?:%[\w.-]+(?:, )?)+)", self.attributes) for name in names]
        return [name for texts in found for text in texts for name in re.findall(r"%([\w.-]+)", text)]


_WIDTHS = {"pred": 1, "bf16": 2, "s4": 0.5, "u4": 0.5, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all")
_VIEWS = ("bitcast", "reshape", "get-tuple-element")
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollective")


def shape_bytes(shape: str, slow_only: bool = False) -> float:
    """Bytes of a shape as HLO writes it, tuples too; `slow_only` leaves out what is not in the device's main memory."""
    return sum(_array_bytes(shape, slow_only))


def _array_bytes(shape: str, slow_only: bool = False) -> list[float]:
    sizes: list[float] = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)
        width = _WIDTHS.get(dtype, int(bits[0]) / 8 if bits else 0)
        count = math.prod(int(n.lstrip("<=")) for n in dims.split(",") if n)
        sizes.append(0.0 if slow_only and re.search(r"S\([1-9]", layout) else float(width * count))
    return sizes


@dataclass
class Program:
    """The text of a compiled program (`compiled.as_text()`), read for what moves in it."""

    text: str
    n_devices: int
    leave_out: str = "$^"  # loops whose op_name this pattern is in, as those of a kernel's stand-in
    computations: dict[str, dict[str, _Instruction]] = field(init=False, repr=False, default_factory=dict)
    entry: str = field(init=False)

    def __post_init__(self) -> None:
        for line in self.text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                current = self.computations.setdefault(head[2], {})
                if head[1]:
                    self.entry = head[2]
            elif instruction := _read(line):
                current[instruction.name] = instruction

    @cached_property
    def runs(self) -> dict[str, int]:
        """How often a step runs each computation that is no fusion."""
        counts: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            counts[name] = counts.get(name, 0) + times
            for instruction in self.computations[name].values():
                if instruction.op == "while" and not re.search(self.leave_out, instruction.op_name):
                    for body in instruction.called("body"):
                        visit(body, times * self._trips(instruction))
                elif instruction.op in ("call", "conditional", "async-start"):
                    for part in instruction.called("to_apply", "calls", "true_computation", "branch_computations"):
                        visit(part, times)

        visit(self.entry, 1)
        return counts

    def _trips(self, loop: _Instruction) -> int:
        """How often a loop's body runs: as the compiler notes it, or by the constant that its counter is below."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        [condition] = loop.called("condition")
        limits = [i for i in self.computations[condition].values() if i.op == "constant"]
        numbers = [int(n[1]) for i in limits if (n := re.search(r"^(\d+)", i.attributes))]
        return max(numbers, default=1)

    def loops(self) -> Iterator[tuple[_Instruction, int]]:
        """Each loop of the program, and how often its body runs each time."""
        for name in self.runs:
            yield from ((i, self._trips(i)) for i in self.computations[name].values() if i.op == "while")

    def stacked_bytes(self, n_layer: int) -> float:
        """Bytes of the arrays with a place for each layer that the forward pass fills, for the backward pass to read.

        0 where layers do not run as a loop.
        """
        most = 0.0
        for loop, trips in self.loops():
            if trips == n_layer and "jvp(" in loop.op_name and "transpose(" not in loop.op_name:
                body = self.computations[loop.called("body")[0]]
                sizes, dims = _array_bytes(loop.shape), [m[1] for m in _ARRAY.findall(loop.shape)]
                root = next(i for i in body.values() if i.is_root)
                stacks = [
                    size
                    for size, dim, operand in zip(sizes, dims, root.operands, strict=False)
                    if dim.split(",")[0] == str(n_layer) and self._source(body, operand).op not in _FREE
                ]
                most = max(most, sum(stacks))
        return most

    def _source(self, computation: dict[str, _Instruction], name: str) -> _Instruction:
        """What makes a value: its instruction, past views of it and the copies that carry it along."""
        instruction = computation[name]
        while instruction.op in (*_VIEWS, "copy", "copy-done", "copy-start", "opt-barrier") and instruction.operands:
            made = computation[instruction.operands[0]]
            if instruction.op == "get-tuple-element" and made.op in ("fusion", "while", "custom-call"):
                return made
            instruction = made
        return instruction

    def collectives(self) -> list[Collective]:
        """All collectives of a step, those inside of fusions too."""
        found: list[Collective] = []
        for name, times in self.runs.items():
            for instruction in self.computations[name].values():
                for computation, each in self._inside(instruction):
                    # TPUs spread one transfer over a chain of fusions and write it in each; the first has a start.
                    starts = any("AsyncCollectiveStart" in other.attributes for other in computation.values())
                    if "chain_id=" not in each.attributes or starts:
                        found.append(self._collective(computation, each, times))
        return [each for each in found if len(each.group) > 1]

    def _inside(self, instruction: _Instruction) -> Iterator[tuple[dict[str, _Instruction], _Instruction]]:
        """The collectives that an instruction is or has in it, each with its computation."""
        for called in instruction.called("calls") if instruction.op == "fusion" else ():
            for each in self.computations[called].values():
                if each.op.removesuffix("-start") in _COLLECTIVES:
                    yield self.computations[called], each
                elif each.op == "fusion":
                    yield from self._inside(each)
        if instruction.op.removesuffix("-start") in _COLLECTIVES:
            home = next(c for c in self.computations.values() if c.get(instruction.name) is instruction)
            yield home, instruction

    def _collective(self, computation: dict[str, _Instruction], each: _Instruction, times: int) -> Collective:
        kind, group = each.op.removesuffix("-start"), _group(each.attributes, self.n_devices)
        size, n = sum(shape_bytes(computation[name].shape) for name in each.operands), len(group)
        if kind == "all-reduce" and self._is_scattered(computation, each):
            kind = "reduce-scatter"
        part = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
        return Collective(kind, re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", each.shape), size * part, group, times)

    def _is_scattered(self, computation: dict[str, _Instruction], each: _Instruction) -> bool:
        """TPUs: a fusion of an all-reduce and of a slice of it by the device's number is a reduce-scatter."""
        users = [i for i in computation.values() if each.name in i.operands]
        return bool(users) and all(
            i.op == "dynamic-slice" or (i.op in _VIEWS and self._is_scattered(computation, i)) for i in users
        )

    def traffic(self) -> float:
        """Bytes of main memory that a step reads and writes on one device: an estimate.

        Each instruction reads its operands and writes its result once; of an array that it only slices or updates in
        place it touches that part. What the compiler keeps in a TPU's on-chip memory is left out.
        """
        return sum(
            times * sum(self._touched(self.computations[name], i) for i in self.computations[name].values())
            for name, times in self.runs.items()
        )

    def _touched(self, computation: dict[str, _Instruction], each: _Instruction) -> float:
        operands = [computation[name].shape for name in each.operands]
        if each.op in _FREE or each.op.endswith(("-done", "-update")):
            return 0.0
        if each.op == "custom-call" and re.search("|".join(_FREE_CALLS), each.attributes):
            return 0.0
        if each.op in ("fusion", "fusion-start"):
            [called] = each.called("calls")
            inner = self.computations[called]
            reads = sum(min(shape_bytes(shape, True), self._read_of(called, i)) for i, shape in enumerate(operands))
            root = next(i for i in inner.values() if i.is_root)
            parts = root.operands if root.op == "tuple" else (root.name,)
            writes = zip(_array_bytes(each.shape if each.op == "fusion" else root.shape, True), parts, strict=False)
            return reads + sum(min(size, self._written_by(inner, part)) for size, part in writes)
        if each.op in ("dynamic-slice", "slice", "gather"):
            return 2 * shape_bytes(each.shape, True)
        if each.op in ("dynamic-update-slice", "scatter"):
            return 2 * shape_bytes(operands[1 if each.op == "dynamic-update-slice" else 2], True)
        if each.op in ("copy-start", "slice-start"):
            pair = _array_bytes(each.shape), _array_bytes(each.shape, True)
            moved = min(pair[0][:2])
            return moved * sum(slow > 0 for slow in pair[1][:2])
        if each.op.removesuffix("-start") in _COLLECTIVES:
            reads = sum(shape_bytes(shape, True) for shape in operands)
            return reads * (2 if each.op.startswith(("all-reduce", "collective-permute")) else 1) + (
                max(_array_bytes(each.shape, True), default=0.0) if each.op.startswith("all-gather") else 0.0
            )
        if each.op == "async-start":
            return 0.0
        scratch = each.op == "custom-call" and "cublas" in each.attributes
        result = each.shape.split("s8[")[0] if scratch else each.shape
        return sum(shape_bytes(shape, True) for shape in operands) + shape_bytes(result, True)

    def _read_of(self, name: str, index: int) -> float:
        """How many bytes of a fusion's operand it reads."""
        inner = self.computations[name]
        parameter = next(
            (i for i in inner.values() if i.op == "parameter" and i.attributes.startswith(f"{index})")), None
        )
        return self._used(inner, parameter) if parameter else math.inf

    def _used(self, inner: dict[str, _Instruction], each: _Instruction) -> float:
        total = 0.0
        for user in inner.values():
            for place in [i for i, operand in enumerate(user.operands) if operand == each.name]:
                if user.op in ("dynamic-slice", "slice", "gather") and place == 0:
                    total += shape_bytes(user.shape)
                elif user.op == "fusion":
                    total += self._read_of(user.called("calls")[0], place)
                elif user.op in _VIEWS:
                    total += self._used(inner, user)
                elif not (
                    (user.op in ("dynamic-update-slice", "scatter") and place == 0)
                    or user.op == "tuple"
                    or "AsyncCollective" in user.attributes
                ):
                    return math.inf
        return total

    def _written_by(self, inner: dict[str, _Instruction], name: str) -> float:
        """How many bytes of a fusion's result it writes."""
        each = inner[name]
        while each.op in ("bitcast", "reshape"):
            each = inner[each.operands[0]]
        if each.op in ("dynamic-update-slice", "scatter"):
            return shape_bytes(inner[each.operands[1 if each.op == "dynamic-update-slice" else 2]].shape)
        if each.op in ("parameter", "get-tuple-element") or "AsyncCollective" in each.attributes:
            return 0.0
        if each.op == "fusion" and not each.shape.startswith("("):
            called = self.computations[each.called("calls")[0]]
            return self._written_by(called, next(i.name for i in called.values() if i.is_root))
        return math.inf


def _read(line: str) -> _Instruction | None:
    """An instruction's line: `%name = shape op(%operand, ...), attribute=value, ...`."""
    head = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, call = rest[:end], rest[end:].lstrip()
    op, _, inside = call.partition("(")
    end = _closing("(" + inside)
    operands = re.findall(r"%([\w.-]+)", inside[: end - 1]) if op != "constant" else []
    # What stands between the parentheses of a constant or a parameter is its value or number, and kept.
    kept = inside if op in ("constant", "parameter") else inside[end:]
    return _Instruction(head[2], shape, op, tuple(operands), kept, bool(head[1]))


def _closing(text: str) -> int:
    """The place behind the parenthesis that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _group(attributes: str, n_devices: int) -> tuple[int, ...]:
    """The first group of devices of a collective, in any of the three ways in which HLO writes groups."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(pairs[1]), int(pairs[2])
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, explicit[1].split(",")))
    order = r"(?:<=|device_ids=\()\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if grid := re.search(r"replica_groups=\[([\d,]+)\]" + order, attributes):
        return tuple(_devices(grid[2], grid[3], n_devices).reshape(_ints(grid[1]))[0].tolist())
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, " + order + r"\))? \{([^}]*)\}", attributes):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        devices = _devices(mesh[2], mesh[3], n_devices).reshape([int(size) for size in axes.values()])
        chosen = [axis in re.findall(r"'(\w+)'", mesh[4]) for axis in axes]
        return tuple(devices[tuple(slice(None) if each else 0 for each in chosen)].flatten().tolist())
    return tuple(range(n_devices))


def _devices(dims: str | None, order: str | None, n_devices: int) -> np.ndarray:
    devices = np.arange(n_devices).reshape(_ints(dims) if dims else [-1])
    return devices.transpose(_ints(order)) if order else devices


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
