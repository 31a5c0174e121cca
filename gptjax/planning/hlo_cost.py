"""Reads the cost of a training step off its program: FLOPs from the jaxpr, memory traffic and collectives from the HLO.

The compilers' own cost analysis counts the body of a loop once, counts nothing for a Pallas kernel, and does not exist
for GPUs.
"""

import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr, jaxprs_in_params

from gptjax.attention import SPLASH_BLOCK, block_pairs


def jaxpr_flops(jaxpr: Jaxpr, window: int = 0) -> float:
    """FLOPs of the matmuls that a program runs, on all devices together; recomputation counts too.

    A matmul in a loop counts once per iteration, one in a shard_map once per device. Elementwise work (norms, softmax,
    optimizer) does not count. `window` is that of the attention kernels, 0 for none.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            avals: Any = [v.aval for v in (eqn.invars[0], eqn.outvars[0])]
            (lhs, result), (axes, _) = [aval.shape for aval in avals], params["dimension_numbers"][0]
            total += 2 * math.prod(result) * math.prod(lhs[axis] for axis in axes)
        elif name == "pallas_call":
            total += _splash_flops(eqn, window)
        elif parts := [jaxpr_flops(part, window) for part in jaxprs_in_params(params)]:
            times = params["length"] if name == "scan" else params["mesh"].size if name == "shard_map" else 1
            total += times * (max(parts) if name == "cond" else sum(parts))
    return total


def _splash_flops(eqn: Any, window: int) -> float:
    """FLOPs of a splash attention kernel with queries [B, N, T, H]: 2 matmuls forward, 5 in the fused backward pass.

    The kernel skips blocks of keys that all queries of a block are masked from, and computes all others whole.
    """
    kernel = str(eqn.params.get("name") or "")
    if not kernel.startswith("splash_"):
        raise NotImplementedError(f"no count of FLOPs for the kernel {kernel!r}")
    *rows, T, H = next(v.aval.shape for v in eqn.invars if v.aval.ndim >= 3 and v.aval.dtype.kind not in "iub")
    size = math.gcd(T, SPLASH_BLOCK)
    n_pairs = len(block_pairs(T // size, size, window)[0])
    matmuls = 5 if "dkv" in kernel else 2
    return float(matmuls * 2 * math.prod(rows) * n_pairs * size**2 * H)


class Collective(NamedTuple):
    """One collective of a program, and how often a step runs it."""

    kind: str  # all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute
    shape: str  # of its result on a device, as HLO writes it
    nbytes: float  # through a device's links, one way, each time, with the best algorithm
    group: tuple[int, ...]  # positions in the mesh of the devices in its first group
    times: int


class Part(NamedTuple):
    """A group of a program's instructions: the bytes of HBM that they read and write in a step, and how many run."""

    name: str
    nbytes: float
    times: int


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def scope(self) -> str:
        """JAX's name stack of the operation that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *names: str) -> list[str]:
        """The computations that the attributes of these names refer to."""
        lists = re.findall(rf"\b(?:{'|'.join(names)})=\{{?((?:%[\w.-]+(?:, )?)+)", self.attributes)
        return [name for text in lists for name in re.findall(r"%([\w.-]+)", text)]


_Computation = dict[str, _Instruction]
# %name = shape op(%operand, ...), attribute=value, ...
_LINE = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*?)\)(, \w+=.*)?$")
_WIDTHS = {"pred": 1, "bf16": 2, "s4": 0.5, "u4": 0.5, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# A collective between TPU slices is a pair of send and recv, with these notes for the runtime of the network.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}x.*_xla_megascale_transfer_type="(\w+)"')
_FREE = "parameter constant tuple get-tuple-element bitcast while conditional call after-all async-start".split()
_FREE_CALLS = re.compile("AllocateBuffer|ConcatBitcast|AssumeGatherIndicesInBound|AsyncCollective")
_VIEWS = ("bitcast", "reshape", "get-tuple-element")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand has the values that they write in place

# The parts of a model, by JAX's name stack; what is outside of the gradient belongs to the optimizer.
_PARTS = {
    "optimizer": r"^(?!.*(jvp|transpose)\().",
    "loss": r"\bloss\b",
    "attention": "/attention/",
    "mlp": "/mlp/",
    "norms": "norm",
    "embedding": "embed",
}


def shape_bytes(shape: str, hbm_only: bool = False) -> float:
    """Bytes of a shape or tuple of shapes in HLO's notation; `hbm_only` leaves out arrays in on-chip memory, "S(1)"."""
    return sum(_array_bytes(shape, hbm_only))


def _array_bytes(shape: str, hbm_only: bool = False) -> list[float]:
    sizes: list[float] = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)
        width = _WIDTHS.get(dtype, int(bits[0]) / 8 if bits else 0)
        count = math.prod(int(n.lstrip("<=")) for n in dims.split(",") if n)
        sizes.append(0.0 if hbm_only and re.search(r"S\([1-9]", layout) else float(width * count))
    return sizes


class Program:
    """A compiled program, parsed from its HLO text (`compiled.as_text()`).

    Instructions and loops whose scope matches the pattern `excluded` do not count.
    """

    def __init__(self, text: str, n_devices: int, excluded: str = "(?!)") -> None:
        self.n_devices, self.excluded = n_devices, excluded
        self.computations: dict[str, _Computation] = {}
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                current = self.computations.setdefault(head[2], {})
                if head[1]:
                    self.entry = head[2]
            elif found := _LINE.match(line):
                root, name, shape, op, inside, attributes = found.groups(default="")
                if op in ("constant", "parameter"):  # the parentheses hold its value or number: kept as an attribute
                    inside, attributes = "", f"{inside}){attributes}"
                operands = tuple(re.findall(r"%([\w.-]+)", inside))
                current[name] = _Instruction(name, shape, op, operands, attributes, bool(root))

    @cached_property
    def runs(self) -> dict[str, int]:
        """How often a step runs each computation; the bodies of fusions are not listed."""
        counts: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            counts[name] = counts.get(name, 0) + times
            for instruction in self.computations[name].values():
                if instruction.op == "while" and not self._is_excluded(self.computations[name], instruction):
                    for body in instruction.called("body"):
                        visit(body, times * self._trip_count(instruction))
                elif instruction.op in ("call", "conditional", "async-start"):
                    for part in instruction.called("to_apply", "calls", "true_computation", "branch_computations"):
                        visit(part, times)

        visit(self.entry, 1)
        return counts

    def _trip_count(self, loop: _Instruction) -> int:
        """The compiler's note, or else the constant that the loop's condition compares its counter with."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        [condition] = loop.called("condition")
        limits = [i for i in self.computations[condition].values() if i.op == "constant"]
        numbers = [int(n[1]) for i in limits if (n := re.search(r"^(\d+)", i.attributes))]
        return max(numbers, default=1)

    def collectives(self) -> list[Collective]:
        """All collectives of a step between several devices, those inside fusions too."""
        found: list[Collective] = []
        for name, times in self.runs.items():
            for home, each in self._collectives_in(self.computations[name]):
                kind, group = each.op.removesuffix("-start"), _first_group(each.attributes, self.n_devices)
                if between := _BETWEEN_SLICES.search(each.attributes):
                    kind, group = between[2].lower().replace("_", "-"), _one_a_slice(between[1], self.n_devices)
                elif kind == "all-reduce" and self._is_scattered(home, each):
                    kind = "reduce-scatter"
                n, size = len(group), sum(shape_bytes(home[operand].shape) for operand in each.operands)
                parts = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
                shape = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", each.shape)
                found.append(Collective(kind, shape, size * parts.get(kind, (n - 1) / n), group, times))
        return [each for each in found if len(each.group) > 1]

    def _collectives_in(self, computation: _Computation) -> Iterator[tuple[_Computation, _Instruction]]:
        """The collectives of a computation and of its fusions, each with the computation that contains it."""
        # A TPU spreads a transfer over a chain of fusions and repeats it in each: the one with the start counts.
        starts = any("AsyncCollectiveStart" in i.attributes for i in computation.values())
        for each in computation.values():
            between_slices = each.op == "send" and _BETWEEN_SLICES.search(each.attributes)
            counts = each.op.removesuffix("-start") in _COLLECTIVES and (starts or "chain_id=" not in each.attributes)
            if each.op == "fusion":
                for called in each.called("calls"):
                    yield from self._collectives_in(self.computations[called])
            elif between_slices or counts:
                yield computation, each

    def _is_scattered(self, computation: _Computation, each: _Instruction) -> bool:
        """Whether only slices of a value are used: a TPU fuses an all-reduce with a slice into a reduce-scatter."""
        users = [i for i in computation.values() if each.name in i.operands]
        slices = (i.op == "dynamic-slice" or (i.op in _VIEWS and self._is_scattered(computation, i)) for i in users)
        return bool(users) and all(slices)

    def breakdown(self, similar: bool = False) -> list[Part]:
        """The traffic by direction and part of the model, or by `similar` instructions; the largest first.

        It estimates the bytes of HBM, not of a TPU's on-chip memory, that a step reads and writes on one device:
        each instruction reads its operands and writes its result once, or only the part that it slices or updates.
        Instructions are similar if they differ in no more than the numbers in their scope. A fusion counts where its
        last operation belongs.
        """
        sums = dict[str, tuple[float, int]]()
        for each, n_bytes, times in self._movers():
            name = _description(each) if similar else _part_of_model(each.scope)
            total, count = sums.get(name, (0.0, 0))
            sums[name] = total + n_bytes, count + times
        return sorted((Part(name, *sums[name]) for name in sums), key=lambda part: -part.nbytes)

    def _movers(self) -> Iterator[tuple[_Instruction, float, int]]:
        """The instructions that read or write HBM, with their bytes in a step and how often they run in it."""
        for name, times in self.runs.items():
            for each in self.computations[name].values():
                moved = self._moved(self.computations[name], each)
                if moved and not self._is_left_out(self.computations[name], each):
                    yield each, times * moved, times

    def _is_left_out(self, computation: _Computation, each: _Instruction) -> bool:
        """Whether an instruction is excluded, or a copy without a scope, which XLA adds, of or for what is excluded."""
        if each.op != "copy" or each.scope:
            return self._is_excluded(computation, each)
        source, users = computation[each.operands[0]], list(self._users(computation, each))
        while source.op in _VIEWS:
            source = computation[source.operands[0]]
        only_for_it = bool(users) and all(self._is_excluded(computation, user) for user in users)
        return self._is_excluded(computation, source) or only_for_it

    def _is_excluded(self, computation: _Computation, each: _Instruction) -> bool:
        """Whether an instruction is excluded, or all that a fusion computes, or all that use a constant array."""
        if each.op != "fusion":
            return bool(re.search(self.excluded, each.scope))
        if not each.operands:
            return all(self._is_excluded(computation, user) for user in self._users(computation, each))
        inner = self.computations[each.called("calls")[0]]
        found = [self._is_excluded(inner, i) for i in inner.values() if i.op not in _FREE]
        return bool(found) and all(found)

    def _users(self, computation: _Computation, each: _Instruction) -> Iterator[_Instruction]:
        """The instructions that use a value, also as a part of a tuple."""
        for user in computation.values():
            if each.name in user.operands:
                yield from self._users(computation, user) if user.op in ("tuple", *_VIEWS) else [user]

    def _moved(self, computation: _Computation, each: _Instruction) -> float:
        """Bytes of HBM that an instruction reads and writes each time it runs."""
        operands, op = [computation[name].shape for name in each.operands], each.op
        free_call = op == "custom-call" and _FREE_CALLS.search(each.attributes)
        if op in _FREE or op.endswith(("-done", "-update")) or free_call:
            return 0.0
        if op in ("fusion", "fusion-start"):
            return self._moved_by_fusion(each, operands)
        if op in _SLICES:
            return 2 * shape_bytes(each.shape, True)
        if op in _UPDATES:
            return 2 * shape_bytes(operands[_UPDATES[op]], True)
        if op in ("copy-start", "slice-start"):  # its result is (destination, source, ...)
            return min(_array_bytes(each.shape)[:2]) * sum(n > 0 for n in _array_bytes(each.shape, True)[:2])
        reads = sum(shape_bytes(shape, True) for shape in operands)
        if op.removesuffix("-start") in _COLLECTIVES:
            gathered = _array_bytes(each.shape, True) if op.startswith("all-gather") else []
            times = 2 if op.startswith(("all-reduce", "collective-permute")) else 1
            return times * reads + max(gathered, default=0.0)
        if op == "send":  # its result names the operand
            return reads
        scratch = op == "custom-call" and "cublas" in each.attributes
        return reads + shape_bytes(each.shape.split("s8[")[0] if scratch else each.shape, True)

    def _moved_by_fusion(self, each: _Instruction, operands: list[str]) -> float:
        [called] = each.called("calls")
        inner = self.computations[called]
        reads = sum(min(shape_bytes(shape, True), self._read_of(called, i)) for i, shape in enumerate(operands))
        [root] = [i for i in inner.values() if i.is_root]
        parts = root.operands if root.op == "tuple" else (root.name,)
        results = _array_bytes(each.shape if each.op == "fusion" else root.shape, True)
        return reads + sum(min(n, self._written_to(inner, name)) for n, name in zip(results, parts, strict=False))

    def _read_of(self, fusion: str, index: int) -> float:
        """Bytes that a fusion reads of its operand number `index`; infinity: all of it."""
        inner, total = self.computations[fusion], 0.0
        names = [i.name for i in inner.values() if i.op == "parameter" and i.attributes.startswith(f"{index})")]
        for name in names:  # the operand, and the views of it that are found on the way
            for user, place in [(i, place) for i in inner.values() for place, n in enumerate(i.operands) if n == name]:
                if user.op in _SLICES and place == 0:
                    total += shape_bytes(user.shape)
                elif user.op == "fusion":
                    total += self._read_of(user.called("calls")[0], place)
                elif user.op in _VIEWS:
                    names.append(user.name)
                elif not (
                    (user.op in _UPDATES and place == 0) or user.op == "tuple" or "AsyncCollective" in user.attributes
                ):
                    return math.inf
        return total

    def _written_to(self, inner: _Computation, name: str) -> float:
        """Bytes that a fusion writes to one of its results; infinity: all of it."""
        each = inner[name]
        while each.op in ("bitcast", "reshape"):
            each = inner[each.operands[0]]
        if each.op in _UPDATES:
            return shape_bytes(inner[each.operands[_UPDATES[each.op]]].shape)
        if each.op in ("parameter", "get-tuple-element") or "AsyncCollective" in each.attributes:
            return 0.0
        if each.op == "fusion" and not each.shape.startswith("("):
            called = self.computations[each.called("calls")[0]]
            return self._written_to(called, next(i.name for i in called.values() if i.is_root))
        return math.inf


def _part_of_model(scope: str) -> str:
    part = next((name for name, pattern in _PARTS.items() if re.search(pattern, scope)), "other")
    one_way = part in ("optimizer", "loss") or not scope
    return part if one_way else f"{part}, {'backward' if 'transpose(' in scope else 'forward'}"


def _description(each: _Instruction) -> str:
    """An instruction's operation, result and scope in 70 columns, with "#" for the numbers in the scope."""
    shape, scope = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", each.shape), re.sub(r"\d+", "#", each.scope)
    start = f"{each.op} {shape[:32]} "
    return (start + scope[len(start) - 70 :]).strip()


def _first_group(attributes: str, n_devices: int) -> tuple[int, ...]:
    """The devices of a collective's first group, in any of the notations that HLO has for groups."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(pairs[1]), int(pairs[2])
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(_integers(explicit[1]))
    order = r"(?:<=|device_ids=\()\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if grid := re.search(r"replica_groups=\[([\d,]+)\]" + order, attributes):
        return tuple(_device_grid(grid[2], grid[3], n_devices).reshape(_integers(grid[1]))[0].tolist())
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, " + order + r"\))? \{([^}]*)\}", attributes):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        devices = _device_grid(mesh[2], mesh[3], n_devices).reshape([int(size) for size in axes.values()])
        chosen = [axis in re.findall(r"'(\w+)'", mesh[4]) for axis in axes]
        return tuple(devices[tuple(slice(None) if each else 0 for each in chosen)].flatten().tolist())
    return tuple(range(n_devices))


def _one_a_slice(slices: str, n_devices: int) -> tuple[int, ...]:
    """The first device of each slice, from a list of slices such as "1,2" or "1:4"."""
    ends = [_integers(part.replace(":", ",")) for part in slices.split(",")]
    n_slices = sum(part[-1] - part[0] + 1 for part in ends)
    return tuple(range(0, n_devices, n_devices // n_slices))


def _device_grid(dims: str | None, order: str | None, n_devices: int) -> np.ndarray:
    devices = np.arange(n_devices).reshape(_integers(dims) if dims else [-1])
    return devices.transpose(_integers(order)) if order else devices


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
