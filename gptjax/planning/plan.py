"""Plans a training step for hardware that is not here: compiles it, and derives its memory, time and collectives."""

import itertools
import math
import re
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config, MeshConfig
from gptjax.errors import UserError
from gptjax.flops import step_flops
from gptjax.hub.init_from import open_pretrained
from gptjax.planning.hlo_cost import Part, Program, jaxpr_flops
from gptjax.planning.topology import Topology
from gptjax.resolve import resolve
from gptjax.sharding import AXES, make_mesh, state_share
from gptjax.training import state_bytes, trace_train_step

GPT2_TOKENS = 50257
GIB = 2**30
REMATS: tuple[Any, ...] = ("none", "dots", "full")
MAX_MESHES = 6  # that a search tries


@dataclass(frozen=True)
class CollectiveTotal:
    """All collectives of one kind over the same mesh axes in a step, on one chip."""

    kind: str
    axes: str
    count: int
    bytes: float  # through the chip's links, one way
    seconds: float  # at the full speed of the links


@dataclass
class Plan:
    """A step of `config` on `topology`. Bytes and seconds are per chip, FLOPs for all chips together."""

    config: Config
    topology: Topology
    mesh: Mesh
    parameters: int
    model_flops: float  # without recomputation, as MFU counts them
    executed_flops: float  # of all matmuls that run, recomputed ones too
    hbm_parts: dict[str, float]  # bytes by use
    hbm_bytes: float = 0.0  # that the step needs
    stands_in: bool = False  # blockwise attention, for cuDNN's
    fits: bool = False
    compile_seconds: float | None = None  # None: not compiled, since the FLOPs alone take too long
    hbm_traffic_bytes: float = math.nan  # that the step reads and writes
    traffic_parts: list[Part] = field(default_factory=list)  # of the model
    instructions: list[Part] = field(default_factory=list)  # similar ones in one row
    collectives: list[CollectiveTotal] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """The tokens of a step."""
        return self.config.train.batch_size * self.config.model.block_size

    @property
    def seconds(self) -> dict[str, float]:
        """How long each of a chip's resources is busy with a step if it runs at its peak."""
        peak = self.topology.peak
        return {
            "flops": self.executed_flops / self.mesh.size / peak.flops,
            "hbm": self.hbm_traffic_bytes / peak.bandwidth,
            "links": sum(each.seconds for each in self.collectives) if self.fits else math.nan,
        }

    @property
    def roofline_seconds(self) -> float:
        """The duration of a step if the resources overlap perfectly: a lower bound."""
        return max(self.seconds.values())

    @property
    def serial_seconds(self) -> float:
        """The duration of a step if nothing overlaps, with each resource at its peak."""
        return sum(self.seconds.values())

    def mfu(self, seconds: float) -> float:
        """The model FLOPs utilization of a step that takes this long, as a fraction."""
        return self.model_flops / seconds / (self.mesh.size * self.topology.peak.flops)


def complete_config(config: Config, device: Any) -> Config:
    """The config with the model of `init_from`, the tokenizer's vocabulary size and no "auto".

    Raises `UserError` if the vocabulary depends on the text, which a plan does not read.
    """
    if config.init_from:
        config = open_pretrained(config.init_from).adapt(config)
    tokenizer, known = config.data.tokenizer, {"gpt2": GPT2_TOKENS, "bpe": config.data.vocab_size}
    vocab_size = config.model.vocab_size or known.get(tokenizer)
    if not vocab_size:
        unknown = f"data.tokenizer={tokenizer!r} has no known size"
        raise UserError(f"a plan reads no data, and {unknown}: --model.vocab_size N")
    model = replace(config.model, vocab_size=vocab_size)
    return replace(config, model=resolve(model, device, packed=config.data.format == "chat"))


def make_plan(config: Config, topology: Topology, slower_than: float = math.inf) -> Plan:
    """Trace and compile the step of a complete config; a step that does not fit has no time and no collectives.

    A step whose FLOPs alone take more than `slower_than` seconds is not compiled. Raises `UserError` if the mesh does
    not divide the model or the batch.
    """
    rows = config.train.micro_batch_size
    mesh = make_mesh(config.mesh, rows, state_bytes(config), topology.devices)
    config = replace(config, mesh=MeshConfig(**mesh.shape))
    stands_in = config.model.attention == "cudnn"  # which cannot be compiled without cuDNN
    if stands_in:
        config = replace(config, model=replace(config.model, attention="blockwise"))
    state, traced = trace_train_step(config, mesh)
    n_params, params = sum(leaf.size for leaf in jax.tree.leaves(state.params)), _shard_bytes(state.params)
    parts = {"parameters": params, "optimizer": _shard_bytes(state) - params}
    all_flops = jaxpr_flops(traced.jaxpr.jaxpr, config.model.local_window)
    model_flops = float(step_flops(config, state.params))
    plan = Plan(config, topology, mesh, n_params, model_flops, all_flops, parts, stands_in=stands_in)
    if plan.seconds["flops"] > slower_than:
        return plan
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        plan.hbm_bytes = bytes_refused(error)
    else:
        _add_memory_and_time(plan, compiled)
    plan.compile_seconds = time.perf_counter() - start
    return plan


def _shard_bytes(tree: Any) -> float:
    """Bytes of a tree's arrays on one device."""
    shards = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree)]
    return float(sum(math.prod(shape) * width for shape, width in shards))


def bytes_refused(error: Exception) -> float:
    """Bytes that a program needs, from the compiler's message that it does not fit; other errors are raised again."""
    text = str(error)
    found = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds available HBM", text)
    if "RESOURCE_EXHAUSTED" not in text or not found:
        raise error
    return float(found[1] or found[3]) * 1024 ** (1 + "KMGT".index(found[2] or found[4]))


def _add_memory_and_time(plan: Plan, compiled: Any) -> None:
    memory = compiled.memory_analysis()
    program = Program(compiled.as_text(), plan.mesh.size, excluded="/attention/kernel/" if plan.stands_in else "(?!)")
    state = sum(plan.hbm_parts.values())
    plan.hbm_parts |= {
        "padding and batch": memory.argument_size_in_bytes - state,
        "temporary": memory.peak_memory_in_bytes - memory.argument_size_in_bytes,  # not all of it lives at the peak
        "program": memory.generated_code_size_in_bytes,
    }
    plan.hbm_bytes = sum(plan.hbm_parts.values())
    plan.fits = plan.topology.platform == "tpu" or plan.hbm_bytes <= plan.topology.capacity  # a TPU's compiler refuses
    kernel = [_kernel_traffic(plan)] if plan.stands_in else []
    plan.traffic_parts, plan.instructions = [program.breakdown(similar) + kernel for similar in (False, True)]
    plan.hbm_traffic_bytes = sum(part.nbytes for part in plan.traffic_parts)
    plan.collectives = _totals(plan, program)


def _totals(plan: Plan, program: Program) -> list[CollectiveTotal]:
    """The collectives of a program by kind and by the mesh axes they cross, those that take longest first."""
    grid, sums = plan.mesh.devices, dict[tuple[str, str], Any]()
    for each in program.collectives():
        places = np.array(np.unravel_index(each.group, grid.shape))
        axes = "+".join(axis for axis, row in zip(AXES, places, strict=True) if len(set(row)) > 1)
        seconds = each.nbytes / plan.topology.bandwidth([grid.flat[i] for i in each.group])
        sums[each.kind, axes] = sums.get((each.kind, axes), 0) + each.times * np.array([1, each.nbytes, seconds])
    rows = [CollectiveTotal(*key, int(count), float(n), float(s)) for key, (count, n, s) in sums.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def _kernel_traffic(plan: Plan) -> Part:
    """What a fused attention kernel reads and writes in a step on one chip.

    The forward pass, which runs twice with remat, reads queries, keys and values and writes the result; the backward
    pass reads those and the result's gradient and writes three gradients.
    """
    model, train = plan.config.model, plan.config.train
    queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    forward, backward = 2 * queries + 2 * keys, 4 * queries + 4 * keys
    times = 1 if model.remat == "none" else 2
    per_token = model.n_layer * (times * forward + backward) * jax.numpy.dtype(model.dtype).itemsize
    n_runs = model.n_layer * (times + 1) * train.accumulate
    return Part("attention kernel", per_token * plan.tokens / plan.mesh.size, n_runs)


def search(config: Config, topology: Topology, report: Any) -> Plan:
    """The fastest plan that fits, over meshes, remat and micro-batches; Ctrl-C ends it with the best plan so far.

    For each mesh and remat it takes the largest micro-batch that fits. Plans whose FLOPs alone take longer than the
    best plan so far are not compiled. Each plan is a line of `report`. Raises `UserError` if nothing fits.
    """
    fitting: list[Plan] = []
    print(_ROW.format("mesh", "remat", "micro-steps", "HBM, GiB", "step, at least, ms", "compiled in, s"), file=report)
    try:
        for mesh, remat in itertools.product(candidate_meshes(config, topology)[:MAX_MESHES], REMATS):
            best = min((plan.roofline_seconds for plan in fitting), default=math.inf)
            for plan in _shrinking(config, topology, mesh, remat, best):
                print(_row(plan), file=report, flush=True)
                fitting += [plan] if plan.fits else []
    except KeyboardInterrupt:
        print("stopped: the best so far", file=report)
    if not fitting:
        raise UserError(f"nothing that was tried fits {topology.name}: more chips, or chips with more memory")
    fastest = min(fitting, key=lambda plan: (plan.roofline_seconds, plan.serial_seconds))
    options = "fastest that fits: --mesh {} --model.remat {} --train.accumulate {}\n"
    print(options.format(*_choices(fastest)), file=report)
    return fastest


_ROW = "{:<14}{:<8}{:>11}{:>12}{:>24}{:>16}"


def _choices(plan: Plan) -> tuple[str, str, int]:
    return "x".join(map(str, astuple(plan.config.mesh))), plan.config.model.remat, plan.config.train.accumulate


def _row(plan: Plan) -> str:
    if plan.compile_seconds is None:
        return _ROW.format(*_choices(plan), "", "the FLOPs alone take longer", "").rstrip()
    least = f"{plan.roofline_seconds * 1e3:,.1f}" if plan.fits else "does not fit"
    return _ROW.format(*_choices(plan), f"{plan.hbm_bytes / GIB:.2f}", least, f"{plan.compile_seconds:.0f}")


def _shrinking(config: Config, topology: Topology, mesh: MeshConfig, remat: Any, slower_than: float) -> Iterator[Plan]:
    """Plans with more and more micro-steps, until one fits; a plan that does not fit says how many to skip."""
    needed = 0  # micro-steps
    for accumulate in micro_steps(config, mesh, remat, topology):
        if accumulate < needed:
            continue
        model, train = replace(config.model, remat=remat), replace(config.train, accumulate=accumulate)
        plan = make_plan(replace(config, model=model, train=train, mesh=mesh), topology, slower_than)
        yield plan
        state = plan.hbm_parts["parameters"] + plan.hbm_parts["optimizer"]
        if plan.fits or plan.compile_seconds is None or state >= topology.capacity:
            return
        needed = math.ceil(accumulate * (plan.hbm_bytes - state) / (topology.capacity - state))


def candidate_meshes(config: Config, topology: Topology) -> list[MeshConfig]:
    """Meshes of all chips whose axes are products of the slice's sides, likely fastest first; data spans the slices.

    Meshes that hold the state in a third of the memory come before others, less tensor parallelism before more, and
    fewer shards before more.
    """
    model, n, sides = config.model, len(topology.devices) // topology.slices, topology.sides
    if topology.platform == "gpu":
        sizes = {2**i for i in range(n.bit_length()) if n % 2**i == 0}
    else:
        sizes = {math.prod(part) for k in range(len(sides) + 1) for part in itertools.combinations(sides, k)}
    state, found = state_bytes(config), []
    for tensor in sorted(size for size in sizes if size <= 16 and model.n_head % size == 0 == model.kv_heads % size):
        for fsdp in sorted(size for size in sizes if n % (size * tensor) == 0 and model.n_embd % size == 0):
            data = n // (fsdp * tensor)
            mesh = MeshConfig(data * topology.slices, fsdp, tensor)
            share = state_share(state, mesh.data, fsdp * tensor, topology.platform)
            if data in sizes and share < topology.capacity:
                found.append((share > topology.capacity / 3, tensor, fsdp, mesh))
    return [mesh for *_, mesh in sorted(found, key=lambda each: each[:3])]


def micro_steps(config: Config, mesh: MeshConfig, remat: str, topology: Topology) -> Iterator[int]:
    """Numbers of micro-steps, fewest first, without those whose activations alone do not fit."""
    model, batch, shards = config.model, config.train.batch_size, mesh.data * mesh.fsdp
    if batch % shards:
        return
    heads = model.n_head * model.head_width + 2 * model.kv_heads * model.head_width
    ups = 2 if model.activation == "swiglu" else 1
    features = model.n_embd + (0 if remat == "full" else 2 * model.n_embd + heads + ups * model.mlp_features)
    for rows in (n for n in range(batch // shards, 0, -1) if (batch // shards) % n == 0):
        if model.n_layer * features * rows * model.block_size * 2 / mesh.tensor < topology.capacity:
            yield batch // (shards * rows)
