"""A plan's hardware, figures and screen; the slow tests compile for TPUs and need the extra `plan`."""

import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.plan import main
from gptjax.planning import plan as planning
from gptjax.planning.hlo_cost import Part, Program
from gptjax.planning.page import to_json, to_text
from gptjax.planning.plan import (
    CollectiveTotal,
    Plan,
    candidate_meshes,
    complete_config,
    make_plan,
    micro_steps,
    search,
)
from gptjax.planning.topology import GPUS, TPUS, Topology, find_topology, slice_sides
from gptjax.resolve import resolve
from gptjax.sharding import AXES, make_mesh
from gptjax.training import trace_train_step

ROOT = Path(__file__).parents[2]
WHOLE = slice(None)
GPT2 = Config(
    data=DataConfig(source="data/openwebtext", tokenizer="gpt2"),
    model=ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024),
    train=TrainConfig(batch_size=512, accumulate=4, max_steps=600_000),
)
PLANNED = complete_config(GPT2, SimpleNamespace(platform="tpu", device_kind="TPU v5 lite"))


def test_hardware_has_product_names_and_a_peak():
    # cloud.google.com/tpu/docs/v5e, /v6e, /v5p: the tables of slices
    v5e = {1: (1, 1), 8: (2, 4), 16: (4, 4), 256: (16, 16), 12: ()}
    v5p = {8: (2, 2, 1), 32: (2, 2, 4), 128: (4, 4, 4), 2048: (8, 8, 16)}
    assert {size: slice_sides(TPUS["v5e"], (size,)) for size in v5e} == v5e
    assert {size: slice_sides(TPUS["v5p"], (size,)) for size in v5p} == v5p
    assert all(Topology("", each, (1,), 0, []).peak.flops > 0 for each in (*TPUS.values(), *GPUS.values()))


@pytest.mark.parametrize(
    "name",
    ["v7:4", "v5e", "v5e:32x32", "v5e:4x4x0", "v4:2x2x1x2", "v5p:4x4", "h100:0", "a10:8", "v5e-12", "rtx4090:2x1"],
)
def test_an_unknown_topology_is_one_line(name):
    with pytest.raises(UserError, match=re.escape(repr(name))) as raised:
        find_topology(name)
    assert "v5e:4x4" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("family", "sides", "group", "links"),
    [
        ("v5e", (4, 4), (WHOLE, WHOLE), 2),  # a chip in a corner has one neighbour along each side
        ("v5e", (4, 4), (WHOLE, 0), 1),
        ("v5e", (16, 16), (WHOLE, 0), 2),  # a ring
        ("v5e", (16, 16), (WHOLE, slice(0, 8)), 3),
        ("v5p", (4, 4, 4), (WHOLE, WHOLE, WHOLE), 6),
        ("v5p", (2, 4, 4), (0, 0, WHOLE), 1),
    ],
)
def test_links_that_reach_a_chip(family, sides, group, links):
    devices = [SimpleNamespace(coords=coords) for coords in np.ndindex(*sides)]
    found = Topology("", TPUS[family], sides, 0, []).bandwidth(np.array(devices).reshape(sides)[group].ravel().tolist())
    assert found == links * {"v5e": 50e9, "v5p": 100e9}[family]


def test_gpus_of_several_nodes_share_their_network():
    nodes = [[SimpleNamespace(process_index=node) for _ in range(8)] for node in range(2)]
    topology = Topology("", GPUS["h100"], (2, 8), 0, [])
    assert (topology.bandwidth(nodes[0]), topology.bandwidth([nodes[0][0], nodes[1][0]])) == (450e9, 50e9)
    # An all-gather of S bytes brings each GPU 15/16 S, and each node S/2 over its eight network cards.
    assert topology.bandwidth(nodes[0] + nodes[1]) == min(450e9, 50e9 * 15)


@pytest.mark.parametrize(
    ("family", "capability", "tera_fp32", "dtype"),
    # FP32 TFLOP/s of the vendor's data sheets and white papers: cores x units x 2 x clock.
    [
        ("a100", (8, 0), 19.5, "bfloat16"),
        ("h100", (9, 0), 67, "bfloat16"),
        ("l4", (8, 9), 30.3, "bfloat16"),
        ("l40s", (8, 9), 91.6, "bfloat16"),
        ("rtx3090", (8, 6), 35.6, "bfloat16"),
        ("rtx4090", (8, 9), 82.6, "bfloat16"),
    ],
)
def test_gpus_have_their_datasheets_figures(family, capability, tera_fp32, dtype):
    gpu, peak = GPUS[family], Topology("", GPUS[family], (1, 1), 0, []).peak
    assert gpu.capability == capability and 0.9 < gpu.memory / peak.memory <= 1.0
    assert gpu.cores * gpu.fpus * 2 * gpu.gigahertz * 1e9 == pytest.approx(tera_fp32 * 1e12, rel=0.01)
    nvidia = SimpleNamespace(platform="gpu", compute_capability="{}.{}".format(*capability), device_kind=gpu.kind)
    model = resolve(GPT2.model, nvidia)
    assert (model.dtype, model.attention) == (dtype, "cudnn")


def test_cards_of_one_node_talk_over_pci_express():
    devices = [SimpleNamespace(process_index=0) for _ in range(2)]
    assert Topology("", GPUS["rtx4090"], (1, 2), 0, []).bandwidth(devices) == pytest.approx(31.5e9, rel=0.01)


def test_slices_share_the_network_of_their_chips():
    chips = [SimpleNamespace(coords=coords, slice_index=s) for s in (0, 1) for coords in np.ndindex(2, 2)]
    topology = Topology("", TPUS["v5e"], (2, 2), 0, [], slices=2)
    assert topology.bandwidth(chips[:4]) == 2 * 50e9
    assert topology.bandwidth([chips[0], chips[4]]) == 6.4e12 / 8 / 256
    assert topology.bandwidth(chips) == 7 * 6.4e12 / 8 / 256  # an all-gather brings each chip 7/8, each slice 1/2 by 4


def test_the_vocabulary_without_the_tokenizer():
    model = PLANNED.model
    assert (model.vocab_size, model.padded_vocab_size, model.dtype) == (50257, 50304, "bfloat16")
    bpe = DataConfig(tokenizer="bpe", vocab_size=512)
    assert complete_config(replace(GPT2, data=bpe), jax.devices()[0]).model.vocab_size == 512
    with pytest.raises(UserError, match="--model.vocab_size"):
        complete_config(replace(GPT2, data=DataConfig(tokenizer="char")), jax.devices()[0])


def test_the_compilers_refusal_says_how_much_memory_a_step_needs():
    start = "RESOURCE_EXHAUSTED: Ran out of memory "
    for message, needed in (
        (f"{start}in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded", 20.5 * 2**30),
        (f"{start}on HBM, temporaries (400.00M) exceeds available HBM (15.75G).", 400 * 2**20),
    ):
        assert planning.bytes_refused(jax.errors.JaxRuntimeError(message)) == needed
    with pytest.raises(jax.errors.JaxRuntimeError):  # other errors are not hidden
        planning.bytes_refused(jax.errors.JaxRuntimeError("INTERNAL: Used 1G of 2G hbm"))


def made(**changes):
    """A plan on 8 chips of v5e: 10 ms of FLOPs, 20 of HBM traffic, 5 of collectives."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4, 1), AXES)
    topology = Topology("v5e:2x4", TPUS["v5e"], (2, 4), int(15.75 * 2**30), jax.devices())
    gibibytes = {"parameters": 1, "optimizer": 2, "padding and batch": 0, "temporary": 5, "program": 0}
    values = {
        "config": replace(PLANNED, mesh=MeshConfig(2, 4, 1)),
        "parameters": 124_000_000,
        "model_flops": 197e12 * 8 * 0.008,
        "executed_flops": 197e12 * 8 * 0.010,
        "hbm_parts": {name: size * 2.0**30 for name, size in gibibytes.items()},
        "fits": True,
        "hbm_bytes": 8.0 * 2**30,
        "compile_seconds": 1.0,
        "hbm_traffic_bytes": 819e9 * 0.020,
        "collectives": [
            CollectiveTotal("all-gather", "fsdp", 26, 200e6, 0.004),
            CollectiveTotal("reduce-scatter", "data+fsdp", 13, 100e6, 0.001),
        ],
    }
    return Plan(topology=topology, mesh=mesh, **values | changes)


def test_json_is_consistent():
    found = json.loads(json.dumps(to_json(made(), price=2.0)))
    assert found["fits"] and found["hbm_bytes"] == sum(found["hbm_parts"].values()) <= found["hbm_capacity_bytes"]
    assert found["seconds"] == pytest.approx({"flops": 0.010, "hbm": 0.020, "links": 0.005})
    assert (found["roofline_seconds"], found["serial_seconds"]) == pytest.approx((0.020, 0.035))
    assert found["tokens_per_second"] == pytest.approx(512 * 1024 / 0.020)
    assert (found["mfu_ceiling"], found["mfu_serial"]) == pytest.approx((0.4, 0.008 / 0.035))
    hours = 600_000 * 0.020 / 3600
    assert found["run"] == pytest.approx({"hours": hours, "chip_hours": 8 * hours, "cost": 16 * hours})


def test_a_plan_that_does_not_fit_has_no_times():
    plan = made(fits=False, hbm_bytes=20.0 * 2**30, hbm_traffic_bytes=math.nan, collectives=[])
    text = json.dumps(to_json(plan, price=None))
    found = json.loads(text)
    assert "NaN" not in text and not found["fits"] and found["executed_flops"] > 0
    assert found["roofline_seconds"] is found["collectives"] is found["run"] is found["seconds"]["hbm"] is None
    screen = to_text(replace(plan, hbm_parts={"parameters": 1.0, "optimizer": 2.0}), "configs/gpt2_124m.py", 1.25)
    assert "DOES NOT FIT" in screen and "$" not in screen


def test_the_screen_is_at_most_100_columns():
    parts = [Part("attention, backward", 12e9, 1200), Part("mlp, forward", 8e9, 24)]
    screen = to_text(made(traffic_parts=parts, instructions=parts), "configs/gpt2_124m.py", 1.25, breakdown=True)
    assert re.search(r"  attention, backward +12\.000 +1,200\n", screen) and re.search(r"in all .* 1,224\n", screen)
    assert max(map(len, screen.splitlines())) <= 100 and screen.count("\n") < 40
    assert all(words in screen for words in ("FITS", "10.00 ms", "20.00 ms", "$", "(estimate)"))


def test_search_recommends_the_fastest_that_fits(monkeypatch):
    tried = []

    def pretend(config, topology, slower_than=math.inf):
        rows = config.train.micro_batch_size // (config.mesh.data * config.mesh.fsdp)
        remat = config.model.remat
        tried.append((config.mesh, remat, rows))
        flops = 197e12 * 8 * {"none": 0.010, "dots": 0.011, "full": 0.013}[remat]
        most = {"none": 2, "dots": 8, "full": 16}[remat]
        fits, needed = rows <= most, rows / most * 12.75 * 2**30 + 3 * 2**30
        traffic = 819e9 * (0.005 if remat == "full" else 0.010 + 0.02 / rows)
        return made(
            config=config, executed_flops=flops, fits=fits, hbm_bytes=needed, hbm_traffic_bytes=traffic, collectives=[]
        )

    monkeypatch.setattr(planning, "make_plan", pretend)
    report = io.StringIO()
    best = search(PLANNED, made().topology, report)
    # 0.010 + 0.02 / 8 s of HBM traffic with dots; full remat has less of it and 0.013 s of FLOPs
    assert (best.config.model.remat, 512 // best.config.train.accumulate // 8) == ("dots", 8)
    assert "--model.remat dots --train.accumulate 8" in report.getvalue()
    assert len(tried) == len(set(tried)) <= 6 * 3 * 3


def test_a_search_leaves_out_hopeless_plans():
    config, topology = replace(PLANNED, train=TrainConfig(batch_size=1024)), made().topology
    steps = list(micro_steps(config, MeshConfig(1, 8, 1), "none", topology))
    assert steps == sorted(steps) and steps[-1] == 128 and steps[0] > 1, "128 windows at a time are too many"
    llama = replace(config, model=replace(config.model, n_layer=32, n_embd=4096, n_head=32))
    assert all(mesh.fsdp * mesh.tensor == 8 for mesh in candidate_meshes(llama, topology))


def test_mistakes_on_the_command_line():
    for arguments, words in (
        (["--config", str(ROOT / "configs" / "gpt2_124.py")], "gpt2_124m.py"),
        (["--mesh", "4x4"], "DATAxFSDPxTENSOR"),
        (["--price", "-1"], "negative"),
    ):
        with pytest.raises(UserError, match=words):
            main(arguments)


@pytest.fixture
def tpu():
    pytest.importorskip("libtpu")


def planned(*options):
    command = [sys.executable, "-m", "gptjax.plan", "--config", "configs/gpt2_124m.py", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout


@pytest.mark.slow
def test_the_command_plans_gpt2_for_a_slice(tpu):
    found = json.loads(planned("--topology", "v5e:4x4", "--json", "--mesh", "1x16x1"))
    assert found["fits"] and found["hbm_bytes"] < found["hbm_capacity_bytes"] == int(15.75 * 2**30)
    # By hand: without remat the model's own matmuls, 6 N + 6 L D T a token, and no less.
    assert 1.0 <= found["executed_flops"] / found["model_flops"] < 1.15
    moved = sum(each["bytes"] for each in found["collectives"])
    assert 1 < moved / (3 * 2 * found["parameters"] * 4) < 3  # two gathers and a scatter of bfloat16 in 4 micro-steps
    assert found["roofline_seconds"] == max(found["seconds"].values())
    assert "DOES NOT FIT" in planned("--topology", "v5e:2x2", "--train.accumulate", "1")


@pytest.mark.parametrize(
    ("options", "most", "least_mfu"),
    [
        pytest.param(
            "--topology h100:1 --mesh 1x1x1 --train.batch_size 16 --train.accumulate 1 --model.remat none",
            {"hbm_traffic_bytes": 60e9},
            0.75,
            marks=pytest.mark.slow,
        ),
        pytest.param("--topology v5e:4x4", {"hbm_bytes": 5 * 2**30}, 0.93, marks=pytest.mark.endurance),
        pytest.param("--topology v6e:8x8 --train.accumulate 1", {}, 0.60, marks=pytest.mark.endurance),
    ],
)
def test_a_step_of_gpt2_moves_no_more_than_it_did(tpu, options, most, least_mfu):
    found = json.loads(planned("--json", *options.split()))
    assert {name: found[name] for name, limit in most.items() if found[name] > limit} == {}
    assert found["mfu_ceiling"] > least_mfu


@pytest.mark.slow
def test_only_the_data_axis_crosses_the_network_between_slices(tpu):
    topology = find_topology("v5e:2x2x2")
    with pytest.raises(UserError, match="mesh.data=1 .* 2 slices"):
        make_mesh(MeshConfig(1, 8, 1), 16, 0, topology.devices)
    model = ModelConfig(vocab_size=512, block_size=128, n_layer=2, n_head=2, n_embd=256)
    config = Config(
        model=resolve(model, topology.devices[0]), mesh=MeshConfig(2, 4, 1), train=TrainConfig(batch_size=16)
    )
    plan = make_plan(config, topology)
    assert plan.fits and topology.slices == 2 and len({device.slice_index for device in plan.mesh.devices[0].flat}) == 1
    assert {each.axes for each in plan.collectives if "data" in each.axes} == {"data"}
    # An update's reduce-scatter and all-gather, or an all-reduce, of a quarter of the float32 parameters.
    over = sum(each.bytes for each in plan.collectives if each.axes == "data")
    assert 0.8 < over / (plan.parameters * 4 / 4) < 1.3, [each for each in plan.collectives]


@pytest.mark.slow
def test_no_collective_moves_a_whole_embedding_or_logits(tpu):
    config = replace(PLANNED, mesh=MeshConfig(2, 4, 2), train=TrainConfig(batch_size=64))
    mesh = make_mesh(config.mesh, 64, 0, find_topology("v5e:4x4").devices)
    _, traced = trace_train_step(config, mesh)
    with jax.set_mesh(mesh):
        collectives = Program(traced.lower().compile().as_text(), 16).collectives()
    gathers = [each for each in collectives if each.kind in ("all-gather", "all-to-all")]
    assert len(gathers) > 5
    # The vocabulary is split over tensor: 25,152 rows is the largest part of the embedding that a chip gathers.
    assert not any("50304" in each.shape for each in gathers)
    # A row of logits is as long as the vocabulary, or as a tensor shard of it, and no axis beside it is the width's.
    arrays = [set(dims.split(",")) for each in collectives for dims in re.findall(r"\[([\d,]*)\]", each.shape)]
    assert not any(dims & {"50304", "25152"} and not dims & {"768", "192"} for dims in arrays)
