"""What a run needs on hardware that is not here: python -m gptjax.plan --config configs/gpt2_124m.py --topology v5e:4x4

Compiles the real training step with the hardware's own compiler and prints whether it fits, how fast it can be at best
and what that costs. Wants an environment with the extra `plan`. Every field of a config is an option, as of train.py.
"""

import itertools
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax import flops
from gptjax.config import Config, MeshConfig, ModelConfig
from gptjax.errors import UserError
from gptjax.hub.init_from import open_pretrained
from gptjax.planning.hlo_cost import Program, jaxpr_flops
from gptjax.planning.topology import Topology
from gptjax.resolve import resolve
from gptjax.sharding import AXES, make_mesh
from gptjax.training import state_bytes, trace_train_step

GPT2_TOKENS = 50257
GIB = 2**30
REMATS = ("none", "dots", "full")
MOST_MESHES = 6  # that a search tries


@dataclass(frozen=True)
class Moved:
    """The collectives of one kind over the same axes of the mesh, in a step: of one chip."""

    kind: str
    axes: str
    count: int
    bytes: float  # through the chip's links, one way
    seconds: float  # at the full speed of the links


@dataclass
class Plan:
    """What a step of `config` is on `topology`. Bytes and seconds are those of one chip, FLOPs of all together."""

    config: Config
    topology: Topology
    mesh: Mesh
    n_params: int
    model_flops: float  # of a step: `flops.step_flops`, as MFU counts them
    step_flops: float
    parts: dict[str, float]  # bytes of HBM
    fits: bool = False
    wanted: float = 0.0  # bytes of HBM
    pruned: bool = False
    compile_seconds: float = 0.0
    traffic: float = math.nan  # bytes
    collectives: list[Moved] = field(default_factory=list)

    @property
    def chips(self) -> int:
        return self.mesh.size

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.config.train.batch_size * self.config.model.block_size

    @property
    def seconds(self) -> dict[str, float]:
        """What each of the chip's resources needs for a step at its peak."""
        peak = self.topology.peak
        links = sum(each.seconds for each in self.collectives) if self.fits else math.nan
        return {
            "flops": self.step_flops / self.chips / peak.flops,
            "hbm": self.traffic / peak.bandwidth,
            "links": links,
        }

    @property
    def fastest(self) -> float:
        """Seconds of a step if the three overlap perfectly: a step takes no less."""
        return max(self.seconds.values())

    @property
    def serial(self) -> float:
        """Seconds of a step if nothing overlaps, each still at its peak."""
        return sum(self.seconds.values())

    def mfu(self, seconds: float) -> float:
        return self.model_flops / seconds / (self.chips * self.topology.peak.flops)


def make_plan(config: Config, topology: Topology, slower_than: float = math.inf) -> Plan:
    """Trace and compile the step of `config` for `topology`; one that does not fit has no time and no collectives.

    One that its FLOPs alone make slower than `slower_than` seconds is not compiled.

    Raises:
        UserError: the mesh does not divide what it splits.
    """
    rows = config.train.batch_size // config.train.accumulate
    mesh = make_mesh(config.mesh, rows, state_bytes(config), topology.devices)
    config = replace(config, mesh=MeshConfig(**mesh.shape), model=stand_in(config.model, topology))
    state, traced = trace_train_step(config, mesh)
    params = _bytes(state.params)
    parts = {"parameters": params, "optimizer": _bytes(state) - params}
    plan = Plan(config, topology, mesh, _size(state.params), float(flops.step_flops(config, state.params)), 0.0, parts)
    plan.step_flops = jaxpr_flops(traced.jaxpr.jaxpr)
    plan.pruned = plan.seconds["flops"] > slower_than
    if plan.pruned:
        return plan
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        plan.wanted = _refused(error)
    else:
        _measure(plan, compiled)
    plan.compile_seconds = time.perf_counter() - start
    return plan


def stand_in(model: ModelConfig, topology: Topology) -> ModelConfig:
    """The model as it is compiled: cuDNN's kernel wants cuDNN, so blockwise attention stands in for it."""
    model = resolve(model, topology.platform)
    return replace(model, attention="blockwise") if model.attention == "cudnn" else model


def _measure(plan: Plan, compiled: Any) -> None:
    """Fill in what the compiled step says of memory, traffic and collectives."""
    memory, stands_in = compiled.memory_analysis(), plan.config.model.attention == "blockwise"
    program = Program(compiled.as_text(), plan.chips, leave_out="/attention/" if stands_in else "$^")
    state = sum(plan.parts.values())
    # At the moment when it is most; the sum of all temporaries is more than that, since not all live at once.
    temporary = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    kept = min(program.stacked_bytes(plan.config.model.n_layer), temporary)
    plan.parts |= {
        "padding and batch": memory.argument_size_in_bytes - state,
        "activations": kept,
        "temporary": temporary - kept,
        "program": memory.generated_code_size_in_bytes,
    }
    plan.wanted = sum(plan.parts.values())
    plan.fits = not plan.topology.is_gpu or plan.wanted <= plan.topology.capacity  # the TPU compiler would have refused
    plan.traffic = program.traffic() + (_kernel_traffic(plan) if stands_in else 0.0)
    devices, moved = plan.mesh.devices.flatten(), dict[tuple[str, str], tuple[int, float, float]]()
    for each in program.collectives():
        key = each.kind, _axes(plan.mesh, each.group)
        seconds = each.nbytes / plan.topology.bandwidth([devices[i] for i in each.group])
        count, nbytes, before = moved.get(key, (0, 0.0, 0.0))
        moved[key] = count + each.times, nbytes + each.nbytes * each.times, before + seconds * each.times
    rows = [Moved(kind, axes, *figures) for (kind, axes), figures in moved.items()]
    plan.collectives = sorted(rows, key=lambda row: -row.seconds)


def _kernel_traffic(plan: Plan) -> float:
    """Bytes that an attention kernel reads and writes in a step on one chip.

    Forward, twice with remat, it reads queries, keys and values and writes the result; backward it reads those and the
    result's gradient, and writes three gradients.
    """
    model = plan.config.model
    queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
    forward, backward = 2 * queries + 2 * keys, 4 * queries + 4 * keys
    times = 1 if model.remat == "none" else 2
    per_token = model.n_layer * (times * forward + backward) * jax.numpy.dtype(model.dtype).itemsize
    return per_token * plan.tokens / plan.chips


def _axes(mesh: Mesh, group: Sequence[int]) -> str:
    """The axes of the mesh along which the devices of a group differ."""
    places = np.array(np.unravel_index(group, mesh.devices.shape))
    return "+".join(axis for axis, row in zip(AXES, places, strict=True) if len(set(row)) > 1)


def _refused(error: Exception) -> float:
    """Bytes that the compiler wants and the chip does not have; any other complaint of its is raised again."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    text = str(error)
    wanted = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds available HBM", text)
    if "RESOURCE_EXHAUSTED" not in text or not wanted:
        raise error
    number, unit = wanted[1] or wanted[3], wanted[2] or wanted[4]
    return float(number) * units[unit]


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> float:
    """Of the largest shard of each array, on one device."""
    shards = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree)]
    return float(sum(math.prod(shape) * width for shape, width in shards))


def without_data(config: Config) -> Config:
    """The config with the vocabulary size that its tokenizer would have.

    Raises:
        UserError: the vocabulary is that of a text which only a run would read.
    """
    if config.init_from:
        config = open_pretrained(config.init_from).adapt(config)
    model, tokenizer = config.model, config.data.tokenizer
    known = {"gpt2": GPT2_TOKENS, "bpe": config.data.vocab_size}
    if not model.vocab_size and tokenizer not in known:
        raise UserError(
            f"a plan reads no data, and data.tokenizer={tokenizer!r} has no known size: --model.vocab_size N"
        )
    return replace(config, model=replace(model, vocab_size=model.vocab_size or known[tokenizer]))


def search(config: Config, topology: Topology, report: Any) -> Plan:
    """The fastest plan that fits, over meshes, remat and micro-batches, best guess first; Ctrl-C ends with the best.

    Of a mesh and a kind of remat that is the largest micro-batch that fits: what did not fit says by how much to go
    down. What its FLOPs alone make slower than the best so far is not compiled.

    Raises:
        UserError: nothing fits.
    """
    best: Plan | None = None
    heads = (
        f"{'mesh':<14}{'remat':<8}{'micro-steps':>11}{'HBM, GiB':>12}{'step, at least, ms':>22}{'compiled in, s':>16}"
    )
    print(heads, file=report, flush=True)
    try:
        for mesh, remat in itertools.product(candidate_meshes(config, topology)[:MOST_MESHES], REMATS):
            for plan in _tries(config, topology, mesh, remat, best.fastest if best else math.inf):
                print(_tried(plan), file=report, flush=True)
                if plan.fits and (best is None or (plan.fastest, plan.serial) < (best.fastest, best.serial)):
                    best = plan
    except KeyboardInterrupt:
        print("stopped: the best so far", file=report)
    if best is None:
        raise UserError(f"nothing that was tried fits {topology.name}: more chips, or chips with more memory")
    mesh = best.config.mesh
    print(
        f"fastest that fits: --mesh {mesh.data}x{mesh.fsdp}x{mesh.tensor} --model.remat {best.config.model.remat} "
        f"--train.accumulate {best.config.train.accumulate}\n",
        file=report,
    )
    return best


def _tries(config: Config, topology: Topology, mesh: MeshConfig, remat: Any, slower_than: float) -> Iterator[Plan]:
    """Plans with smaller and smaller micro-batches, down to one that fits."""
    enough = 0  # micro-steps, as far as is known
    for accumulate in micro_steps(config, mesh, remat, topology):
        if accumulate < enough:
            continue
        train = replace(config.train, accumulate=accumulate)
        tried = replace(config, model=replace(config.model, remat=remat), train=train, mesh=mesh)
        plan = make_plan(tried, topology, slower_than)
        yield plan
        if plan.fits or plan.pruned:
            return
        state = plan.parts["parameters"] + plan.parts["optimizer"]
        if state >= topology.capacity:
            return
        enough = math.ceil(accumulate * (plan.wanted - state) / (topology.capacity - state))


def _tried(plan: Plan) -> str:
    mesh, train = plan.config.mesh, plan.config.train
    start = f"{f'{mesh.data}x{mesh.fsdp}x{mesh.tensor}':<14}{plan.config.model.remat:<8}{train.accumulate:>11}"
    if plan.pruned:
        return f"{start}{'':>12}{'its FLOPs alone are slower':>38}"
    end = f"{plan.fastest * 1e3:>22,.1f}" if plan.fits else f"{'does not fit':>22}"
    return f"{start}{plan.wanted / GIB:>12.2f}{end}{plan.compile_seconds:>16.0f}"


def candidate_meshes(config: Config, topology: Topology) -> list[MeshConfig]:
    """Meshes of all chips whose axes are products of the slice's sides: those that are likely fastest first.

    With less tensor parallelism before more, and with as few shards as hold the state in a third of the memory before
    more of them.
    """
    model, n = config.model, len(topology.devices)
    sides = topology.sides if not topology.is_gpu else (n,)
    sizes = {math.prod(part) for k in range(len(sides) + 1) for part in itertools.combinations(sides, k)}
    sizes = {2**i for i in range(n.bit_length()) if n % 2**i == 0} if topology.is_gpu else sizes
    need = state_bytes(config) / (topology.capacity / 3)
    found = []
    for tensor in sorted(size for size in sizes if size <= 16 and model.n_head % size == 0 == model.kv_heads % size):
        for fsdp in sorted(size for size in sizes if n % (size * tensor) == 0 and model.n_embd % size == 0):
            data = n // (fsdp * tensor)
            if data in sizes and state_bytes(config) / (fsdp * tensor) < topology.capacity:
                found.append((fsdp * tensor < need, tensor, fsdp, MeshConfig(data, fsdp, tensor)))
    return [mesh for *_, mesh in sorted(found, key=lambda each: each[:3])]


def micro_steps(config: Config, mesh: MeshConfig, remat: str, topology: Topology) -> Iterator[int]:
    """Numbers of micro-steps, fewest first, without those whose activations alone could not fit."""
    model, batch, shards = config.model, config.train.batch_size, mesh.data * mesh.fsdp
    if batch % shards:
        return
    heads = model.n_head * model.head_width + 2 * model.kv_heads * model.head_width
    ups = 2 if model.activation == "swiglu" else 1
    features = model.n_embd + (0 if remat == "full" else 2 * model.n_embd + heads + ups * model.mlp_features)
    for rows in (n for n in range(batch // shards, 0, -1) if (batch // shards) % n == 0):
        kept = model.n_layer * features * rows * model.block_size * 2 / mesh.tensor
        if kept < topology.capacity:
            yield batch // (shards * rows)
