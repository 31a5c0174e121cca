"""Prints a plan as one screen of text, and as JSON."""

import math
from dataclasses import asdict
from typing import Any

from gptjax.planning.hlo_cost import Part
from gptjax.planning.plan import GIB, Plan

LARGEST_GROUPS = 20  # groups of instructions that a breakdown shows

NOTES = {
    "parameters": "float32, from shapes and shardings",
    "optimizer": "the optimizer's state, from shapes and shardings",
    "padding and batch": "the rest of the compiler's arguments",
    "temporary": "activations, gradients and all else, at the peak",
    "program": "the compiled code",
    "other": "the rest of the total in the compiler's error",
}
_RUN_ROW = "  {:<30}{:>13}{:>12}{:>9}{:>10}{:>12}{:>12}"


def to_text(plan: Plan, name: str, price: float | None, breakdown: bool = False) -> str:
    """One screen of at most 100 columns, and with `breakdown` a second one."""
    train, topology, model, mesh = plan.config.train, plan.topology, plan.config.model, plan.mesh.shape
    micro_batch = train.micro_batch_size
    lines = [
        f"{name} on {topology.name}: {plan.mesh.size} x {topology.hardware.kind} "
        f"({' x '.join(f'{axis} {size}' for axis, size in mesh.items())})",
        f"  {plan.parameters:,} parameters, {model.dtype}, {model.attention} attention, {model.layers} layers, "
        f"remat {model.remat}",
        f"  {plan.tokens:,} tokens a step: {train.accumulate} x {micro_batch} windows of {model.block_size:,}, "
        f"{micro_batch // (mesh['data'] * mesh['fsdp'])} at a time on a chip",
        "",
        *_memory_lines(plan),
        "",
    ]
    if not plan.fits:
        return "\n".join([*lines, "To use less: --search, more --train.accumulate or --mesh.fsdp, --model.remat full"])
    lines += [*_time_lines(plan), "", *_run_lines(plan, price)]
    if breakdown:
        lines += ["", *_breakdown_lines(plan)]
    if plan.stands_in:
        lines.append(
            "Blockwise attention stands in for cuDNN's kernel: memory is its own, traffic is that of a fused kernel."
        )
    if topology.platform == "gpu":
        lines.append("JAX takes 75% of a GPU's memory; XLA_PYTHON_CLIENT_MEM_FRACTION changes that.")
    return "\n".join(lines)


def _memory_lines(plan: Plan) -> list[str]:
    other = {} if len(plan.hbm_parts) > 2 else {"other": plan.hbm_bytes - sum(plan.hbm_parts.values())}
    verdict = f"{'FITS' if plan.fits else 'DOES NOT FIT'}: needs {plan.hbm_bytes / GIB:.2f} GiB"
    return [
        f"{verdict} of the {plan.topology.capacity / GIB:.2f} that a program can have on a chip",
        *(f"  {name:<20}{size / GIB:>8.2f} GiB  {NOTES[name]}" for name, size in (plan.hbm_parts | other).items()),
    ]


def _time_lines(plan: Plan) -> list[str]:
    peak, seconds, total = plan.topology.peak, plan.seconds, sum(each.bytes for each in plan.collectives)
    teraflops, again = plan.executed_flops / plan.mesh.size / 1e12, plan.executed_flops / plan.model_flops
    rows: list[tuple[str, float, str, float | None, float]] = [
        (f"matmuls ({again:.2f} x the model's own FLOPs)", teraflops, "TFLOP", peak.flops / 1e12, seconds["flops"]),
        ("HBM traffic (estimate)", plan.hbm_traffic_bytes / 1e9, "GB", peak.bandwidth / 1e9, seconds["hbm"]),
        ("links, one collective after the other", total / 1e9, "GB", None, seconds["links"]),
    ]
    for each in plan.collectives:
        if each.bytes >= total / 1000:
            name, gigabytes = f"  {each.kind} over {each.axes}, {each.count:,} times", each.bytes / 1e9
            rows.append((name, gigabytes, "GB", gigabytes / each.seconds, each.seconds))
    lines = [f"{'A step, on each chip':<46}{'amount':>10}{'at most':>21}{'at least':>15}"]
    for name, amount, unit, rate, least in rows:
        speed = f"{rate:,.0f} {unit}/s" if rate else ""
        lines.append(f"  {name:<44}{amount:>10,.3f} {unit:<6}{speed:>14}{least * 1e3:>12,.2f} ms")
    return lines


def _breakdown_lines(plan: Plan) -> list[str]:
    """The parts of the model, and the instructions that move most: their traffic, and how many run."""
    parts, largest = plan.traffic_parts, plan.instructions[:LARGEST_GROUPS]
    total = Part("in all", plan.hbm_traffic_bytes, sum(part.times for part in parts))
    rows: list[tuple[str, list[Part]]] = [
        (f"{'By part of the model':<73}{'GB':>9}{'instructions':>16}", [total, *parts]),
        (f"The {len(largest)} largest groups of instructions", largest),
    ]
    row = "  {:<71}{:>9.3f}{:>16,}".format
    return [line for head, group in rows for line in (head, *(row(name, n / 1e9, times) for name, n, times in group))]


def _run_lines(plan: Plan, price: float | None) -> list[str]:
    def row(name: str, seconds: float) -> str:
        rates = f"{seconds * 1e3:,.2f} ms", f"{plan.tokens / seconds:,.0f}", f"{plan.mfu(seconds):.3f}"
        hours, chip_hours, cost = run_cost(plan, seconds, price).values()
        dollars = "" if cost is None else f"${cost:,.0f}"
        return _RUN_ROW.format(name, *rates, f"{hours:,.1f}", f"{chip_hours:,.0f}", dollars).rstrip()

    steps, seconds = plan.config.train.max_steps, plan.seconds
    slowest = {"flops": "FLOPs", "hbm": "HBM", "links": "links"}[max(seconds, key=lambda name: seconds[name])]
    dollars, cost = ("", "") if price is None else (f", ${price:g} a chip-hour", "cost")
    return [
        f"All {steps:,} steps, {plan.tokens * steps / 1e9:,.1f} billion tokens, no evaluation, no saving{dollars}",
        _RUN_ROW.format("", "step", "tokens/s", "MFU", "hours", "chip-hours", cost).rstrip(),
        _RUN_ROW.format("", "at least", "at most", "at most", *["at least"] * 2, cost and "at least").rstrip(),
        row(f"all overlap: bound by {slowest}", plan.roofline_seconds),
        row("nothing overlaps", plan.serial_seconds),
    ]


def run_cost(plan: Plan, seconds: float, price: float | None) -> dict[str, Any]:
    """Hours, chip-hours and dollars for all of the config's steps at so many seconds a step."""
    hours = seconds * plan.config.train.max_steps / 3600
    chip_hours = hours * plan.mesh.size
    return {"hours": hours, "chip_hours": chip_hours, "cost": None if price is None else chip_hours * price}


def to_json(plan: Plan, price: float | None) -> dict[str, Any]:
    """The figures of the screen in bytes, seconds and FLOPs; those that a plan which does not fit lacks are null."""
    model, train, least, most = plan.config.model, plan.config.train, plan.roofline_seconds, plan.serial_seconds
    timed = {
        "hbm_traffic_bytes": plan.hbm_traffic_bytes,
        "traffic_parts": [part._asdict() for part in plan.traffic_parts],
        "instructions": [part._asdict() for part in plan.instructions[:LARGEST_GROUPS]],
        "collectives": [asdict(each) for each in plan.collectives],
        "roofline_seconds": least,
        "serial_seconds": most,
        "tokens_per_second": plan.tokens / least,
        "tokens_per_second_serial": plan.tokens / most,
        "mfu_ceiling": plan.mfu(least),
        "mfu_serial": plan.mfu(most),
        "run": run_cost(plan, least, price),
        "run_serial": run_cost(plan, most, price),
    }
    fields = {name: value for name, value in vars(plan).items() if name not in ("config", "topology", "mesh")}
    return fields | {
        "topology": plan.topology.name,
        "device_kind": plan.topology.hardware.kind,
        "chips": plan.mesh.size,
        "mesh": dict(plan.mesh.shape),
        "model": {key: getattr(model, key) for key in ("attention", "layers", "remat", "dtype")},
        "batch_size": train.batch_size,
        "accumulate": train.accumulate,
        "tokens_per_step": plan.tokens,
        "hbm_capacity_bytes": plan.topology.capacity,
        "seconds": {key: None if math.isnan(value) else value for key, value in plan.seconds.items()},
        "estimates": ["hbm_traffic_bytes"],
        **{key: value if plan.fits else None for key, value in timed.items()},
    }
