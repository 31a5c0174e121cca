"""A plan as text for a screen, and as JSON."""

import math
from dataclasses import asdict
from typing import Any

from gptjax.planning.plan import GIB, Plan

NOTES = {
    "parameters": "float32, by shapes and shardings",
    "optimizer": "AdamW's moments, by shapes and shardings",
    "padding and batch": "what else the compiler counts as arguments",
    "activations": "kept for the backward pass: an estimate, from the loops",
    "temporary": "the rest of what the compiler reports as one",
    "program": "the code",
    "all else": "as the compiler says in refusing it",
}


def to_text(plan: Plan, name: str, price: float | None) -> str:
    """One screen of at most 100 columns."""
    train, topology = plan.config.train, plan.topology
    model = plan.config.model
    each = train.batch_size // train.accumulate // (plan.mesh.shape["data"] * plan.mesh.shape["fsdp"])
    shape = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items())
    lines = [
        f"{name} on {topology.name}: {plan.chips} x {topology.kind} ({shape})",
        f"  {plan.n_params:,} parameters, {model.dtype}, {model.attention} attention, {model.layers} layers, "
        f"remat {model.remat}",
        f"  {plan.tokens:,} tokens a step: {train.accumulate} x {train.batch_size // train.accumulate} windows of "
        f"{model.block_size:,}, {each} at a time on a chip",
        "",
        *_memory_lines(plan),
        "",
        *(_time_lines(plan) + [""] + _run_lines(plan, price) if plan.fits else []),
    ]
    if not plan.fits:
        lines += ["What takes less: --search, more --train.accumulate or --mesh.fsdp, --model.remat full"]
    elif topology.is_gpu:
        lines += [
            "Blockwise attention stands in for cuDNN's kernel: memory is its own, and for its traffic counts what a",
            "kernel reads and writes. JAX takes 75% of a GPU's memory; XLA_PYTHON_CLIENT_MEM_FRACTION changes that.",
        ]
    return "\n".join(lines)


def _memory_lines(plan: Plan) -> list[str]:
    topology, parts = plan.topology, dict(plan.parts)
    if len(parts) == 2:
        parts["all else"] = plan.wanted - sum(parts.values())
    verdict = "FITS: needs" if plan.fits else "DOES NOT FIT: wants"
    lines = [
        f"{verdict} {plan.wanted / GIB:.2f} GiB of the {topology.capacity / GIB:.2f} that a program can have on a chip"
    ]
    return lines + [f"  {name:<20}{size / GIB:>8.2f} GiB  {NOTES[name]}" for name, size in parts.items()]


def _time_lines(plan: Plan) -> list[str]:
    def line(name: str, amount: float, unit: str, rate: float | None, seconds: float) -> str:
        speed = "" if rate is None else f"{rate:,.0f} {unit}/s"
        return f"  {name:<44}{amount:>10,.3f} {unit:<6}{speed:>14}{seconds * 1e3:>12,.2f} ms"

    peak, seconds, through = plan.topology.peak, plan.seconds, sum(row.bytes for row in plan.collectives)
    again = plan.step_flops / plan.model_flops
    lines = [
        f"{'A step, on each chip':<46}{'amount':>10}{'at most':>21}{'at least':>15}",
        line(
            f"matrix products ({again:.2f} x the model's own)",
            plan.step_flops / plan.chips / 1e12,
            "TFLOP",
            peak.flops / 1e12,
            seconds["flops"],
        ),
        line("HBM traffic (estimate)", plan.traffic / 1e9, "GB", peak.bandwidth / 1e9, seconds["hbm"]),
        line("links, one collective after the other", through / 1e9, "GB", None, seconds["links"]),
    ]
    for row in plan.collectives:
        if row.bytes >= through / 1000:
            name = f"  {row.kind} over {row.axes}, {row.count:,} times"
            lines.append(line(name, row.bytes / 1e9, "GB", row.bytes / row.seconds / 1e9, row.seconds))
    return lines


def _run_lines(plan: Plan, price: float | None) -> list[str]:
    steps, seconds = plan.config.train.max_steps, plan.seconds
    bound = {"flops": "products", "hbm": "HBM", "links": "links"}[max(seconds, key=lambda name: seconds[name])]
    heads = ("step", "tokens/s", "MFU", "hours", "chip-hours", "cost" if price is not None else "")
    sides = ("at least", "at most", "at most", "at least", "at least", "at least" if price is not None else "")
    widths = (14, 13, 9, 10, 12, 12)
    rows = [heads, sides]
    for length in (plan.fastest, plan.serial):
        spent = budget(plan, length, price)
        cost = "" if spent["cost"] is None else f"${spent['cost']:,.0f}"
        rows.append(
            (
                f"{length * 1e3:,.2f} ms",
                f"{plan.tokens / length:,.0f}",
                f"{plan.mfu(length):.3f}",
                f"{spent['hours']:,.1f}",
                f"{spent['chip_hours']:,.0f}",
                cost,
            )
        )
    names = ("", "", f"all overlap: bound by {bound}", "nothing overlaps")
    dollars = "" if price is None else f", ${price:g} a chip-hour"
    return [
        f"All {steps:,} steps, {plan.tokens * steps / 1e9:,.1f} billion tokens, no evaluation, no saving{dollars}",
        *(
            f"  {name:<28}{''.join(f'{cell:>{width}}' for cell, width in zip(row, widths, strict=True))}".rstrip()
            for name, row in zip(names, rows, strict=True)
        ),
    ]


def budget(plan: Plan, seconds: float, price: float | None) -> dict[str, float | None]:
    """What all of the config's steps take at so many seconds a step: hours, chip-hours, and dollars."""
    hours = seconds * plan.config.train.max_steps / 3600
    cost = None if price is None else hours * plan.chips * price
    return {"hours": hours, "chip_hours": hours * plan.chips, "cost": cost}


def to_json(plan: Plan, price: float | None) -> dict[str, Any]:
    """Everything the screen says, in bytes, seconds and FLOPs; null where a step that does not fit has no figure."""
    known = plan.fits
    return {
        "topology": plan.topology.name,
        "device_kind": plan.topology.kind,
        "chips": plan.chips,
        "mesh": dict(plan.mesh.shape),
        "model": {key: getattr(plan.config.model, key) for key in ("attention", "layers", "remat", "dtype")},
        "batch_size": plan.config.train.batch_size,
        "accumulate": plan.config.train.accumulate,
        "tokens_per_step": plan.tokens,
        "parameters": plan.n_params,
        "compile_seconds": plan.compile_seconds,
        "fits": plan.fits,
        "hbm_bytes": plan.wanted,
        "hbm_capacity_bytes": plan.topology.capacity,
        "hbm_parts": plan.parts,
        "step_flops": plan.step_flops,
        "model_flops": plan.model_flops,
        "hbm_traffic_bytes": plan.traffic if known else None,
        "collectives": [asdict(each) for each in plan.collectives] if known else None,
        "seconds": {key: None if math.isnan(value) else value for key, value in plan.seconds.items()},
        "roofline_seconds": plan.fastest if known else None,
        "serial_seconds": plan.serial if known else None,
        "tokens_per_second": plan.tokens / plan.fastest if known else None,
        "tokens_per_second_serial": plan.tokens / plan.serial if known else None,
        "mfu_ceiling": plan.mfu(plan.fastest) if known else None,
        "mfu_serial": plan.mfu(plan.serial) if known else None,
        "run": budget(plan, plan.fastest, price) if known else None,
        "run_serial": budget(plan, plan.serial, price) if known else None,
        "estimates": ["hbm_traffic_bytes", "hbm_parts.activations"],
    }
