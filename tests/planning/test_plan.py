"""A plan's names, figures and screen; slow ones, where gptjax[plan] is installed, are by the real compilers."""

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
from gptjax.planning import plan as planning
from gptjax.planning.hlo_cost import Program
from gptjax.planning.page import to_json, to_text
from gptjax.planning.plan import Moved, Plan, candidate_meshes, micro_steps, search, without_data
from gptjax.planning.topology import GPUS, TPUS, Topology, find_topology, slice_of
from gptjax.sharding import AXES, make_mesh
from gptjax.training import trace_train_step

ROOT = Path(__file__).parents[2]
GPT2 = Config(
    data=DataConfig(source="data/openwebtext", tokenizer="gpt2"),
    model=ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024),
    train=TrainConfig(batch_size=512, accumulate=4, max_steps=600_000),
)


@pytest.mark.parametrize(
    ("family", "size", "sides"),
    [
        ("v5e", 1, (1, 1)),
        ("v5e", 8, (2, 4)),
        ("v5e", 16, (4, 4)),
        ("v5e", 256, (16, 16)),
        ("v6e", 64, (8, 8)),
        ("v5p", 8, (2, 2, 1)),
        ("v5p", 32, (2, 2, 4)),
        ("v5p", 128, (4, 4, 4)),
        ("v5p", 2048, (8, 8, 16)),
        ("v5e", 12, ()),
    ],
)
def test_product_names(family, size, sides):
    # cloud.google.com/tpu/docs/v5e, /v6e, /v5p: the tables of slices
    assert slice_of(TPUS[family], (size,)) == sides


@pytest.mark.parametrize(
    "name", ["v7:4", "v5e", "v5e:32x32", "v5e:4x4x4", "v5p:4x4", "h100:0", "h100", "a10:8", "v5e-12"]
)
def test_a_wrong_topology_is_one_line(name):
    with pytest.raises(UserError, match=re.escape(repr(name))) as raised:
        find_topology(name)
    assert "v5e:4x4" in str(raised.value) and "\n" not in str(raised.value)


def slice_devices(*sides):
    return [SimpleNamespace(coords=coords, process_index=0) for coords in np.ndindex(*sides)]


@pytest.mark.parametrize(
    ("kind", "sides", "group", "links"),
    [
        ("TPU v5 lite", (4, 4), (slice(None), slice(None)), 2),  # an edge's chip has one neighbour each way
        ("TPU v5 lite", (4, 4), (slice(None), 0), 1),
        ("TPU v5 lite", (16, 16), (slice(None), 0), 2),  # goes round
        ("TPU v5 lite", (16, 16), (slice(None), slice(0, 8)), 3),
        ("TPU v5", (4, 4, 4), (slice(None), slice(None), slice(None)), 6),
        ("TPU v5", (2, 4, 4), (0, 0, slice(None)), 1),
    ],
)
def test_links_that_reach_a_chip(kind, sides, group, links):
    devices = np.array(slice_devices(*sides)).reshape(sides)[group].flatten().tolist()
    one = {"TPU v5 lite": 50e9, "TPU v5": 100e9}[kind]
    assert Topology("", kind, sides, 0, []).bandwidth(devices) == links * one


def test_gpus_of_several_nodes_share_their_network():
    nodes = [[SimpleNamespace(process_index=node) for _ in range(8)] for node in range(2)]
    topology = Topology("", "NVIDIA H100 80GB HBM3", (2, 8), 0, [])
    assert topology.bandwidth(nodes[0]) == 450e9
    assert topology.bandwidth([nodes[0][0], nodes[1][0]]) == 50e9
    # An all-gather of S bytes brings each GPU 15/16 S, and its node's eight cards S/2: S/16 each.
    assert topology.bandwidth(nodes[0] + nodes[1]) == min(450e9, 50e9 * 15)


def test_every_family_has_its_figures():
    for hardware in (*TPUS.values(), *GPUS.values()):
        topology = Topology("", hardware.kind, (1, 1, 1), 0, [])
        assert topology.peak.flops > 0
        pair = [SimpleNamespace(coords=(0, 0, i), process_index=i) for i in range(2)]
        assert topology.bandwidth(pair) > 0


def test_the_vocabulary_without_the_tokenizer():
    model = without_data(GPT2).model
    assert (model.vocab_size, model.padded_vocab_size, model.dtype) == (50257, 50304, "bfloat16")
    assert without_data(replace(GPT2, data=DataConfig(tokenizer="bpe", vocab_size=512))).model.vocab_size == 512
    with pytest.raises(UserError, match="--model.vocab_size"):
        without_data(replace(GPT2, data=DataConfig(tokenizer="char")))


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded",
            20.5 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, temporaries (400.00G) exceeds available HBM (15.75G).",
            400 * 2**30,
        ),
    ],
)
def test_a_refusal_is_read(message, wanted):
    assert planning._refused(jax.errors.JaxRuntimeError(message)) == wanted


def test_other_complaints_of_a_compiler_are_not_hidden():
    with pytest.raises(jax.errors.JaxRuntimeError):
        planning._refused(jax.errors.JaxRuntimeError("INTERNAL: Used 1G of 2G hbm"))


def made(**changes):
    """A plan with round figures on 8 chips of v5e: 10 ms of products, 20 of HBM, 5 of links."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4, 1), AXES)
    topology = Topology("v5e:2x4", "TPU v5 lite", (2, 4), int(15.75 * 2**30), jax.devices())
    config = replace(without_data(GPT2), mesh=MeshConfig(2, 4, 1))
    parts = {"parameters": 1.0 * 2**30, "optimizer": 2.0 * 2**30}
    rest = {"padding and batch": 0.0, "activations": 3.0 * 2**30, "temporary": 2.0 * 2**30, "program": 0.0}
    moved = [
        Moved("all-gather", "fsdp", 26, 200e6, 0.004),
        Moved("reduce-scatter", "data+fsdp", 13, 100e6, 0.001),
    ]
    values = {
        "n_params": 124_000_000,
        "model_flops": 197e12 * 8 * 0.008,
        "step_flops": 197e12 * 8 * 0.010,
        "parts": parts | rest,
        "fits": True,
        "wanted": 8.0 * 2**30,
        "traffic": 819e9 * 0.020,
        "collectives": moved,
    }
    return Plan(config=config, topology=topology, mesh=mesh, **values | changes)


def test_json_is_consistent():
    told = json.loads(json.dumps(to_json(made(), price=2.0)))
    assert told["fits"] and told["hbm_bytes"] == sum(told["hbm_parts"].values()) <= told["hbm_capacity_bytes"]
    assert told["seconds"] == pytest.approx({"flops": 0.010, "hbm": 0.020, "links": 0.005})
    assert (told["roofline_seconds"], told["serial_seconds"]) == pytest.approx((0.020, 0.035))
    assert told["tokens_per_second"] == pytest.approx(512 * 1024 / 0.020)
    assert (told["mfu_ceiling"], told["mfu_serial"]) == pytest.approx((0.4, 0.008 / 0.035))
    hours = 600_000 * 0.020 / 3600
    assert told["run"] == pytest.approx({"hours": hours, "chip_hours": 8 * hours, "cost": 16 * hours})


def test_json_of_what_does_not_fit_has_no_figures_of_time():
    plan = made(
        fits=False, wanted=20.0 * 2**30, traffic=math.nan, collectives=[], parts={"parameters": 1.0, "optimizer": 2.0}
    )
    text = json.dumps(to_json(plan, price=None))
    told = json.loads(text)
    assert "NaN" not in text and not told["fits"] and told["roofline_seconds"] is told["collectives"] is None
    assert told["step_flops"] > 0


@pytest.mark.parametrize("fits", [True, False])
def test_the_screen_is_at_most_100_columns(fits):
    lines = to_text(made(fits=fits), "configs/gpt2_124m.py", 1.25).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) < 40
    text = "\n".join(lines)
    assert ("DOES NOT FIT" in text) != fits
    if fits:
        assert "10.00 ms" in text and "20.00 ms" in text and "$" in text and "estimate" in text


def test_search_recommends_the_fastest_that_fits(monkeypatch, capsys):
    tried = []

    def pretend(config, topology, slower_than=math.inf):
        rows = config.train.batch_size // config.train.accumulate // (config.mesh.data * config.mesh.fsdp)
        remat = config.model.remat
        tried.append((config.mesh, remat, rows))
        flops = 197e12 * 8 * {"none": 0.010, "dots": 0.011, "full": 0.013}[remat]
        most = {"none": 2, "dots": 8, "full": 16}[remat]
        fits, wanted = rows <= most, rows / most * 12.75 * 2**30 + 3 * 2**30
        traffic = 819e9 * (0.010 + 0.02 / rows)
        return replace(made(step_flops=flops, fits=fits, wanted=wanted, traffic=traffic, collectives=[]), config=config)

    monkeypatch.setattr(planning, "make_plan", pretend)
    topology = made().topology
    best = search(without_data(GPT2), topology, sys.stdout)
    # 0.010 + 0.02 / 8 is bound by HBM, 0.010 + 0.02 / 16 by the FLOPs of full remat
    assert (best.config.model.remat, 512 // best.config.train.accumulate // 8) == ("dots", 8)
    assert "--model.remat dots --train.accumulate 8" in capsys.readouterr().out
    assert len(tried) == len(set(tried)) <= 6 * 3 * 3


def test_what_cannot_fit_is_not_tried():
    config, topology = replace(without_data(GPT2), train=TrainConfig(batch_size=1024)), made().topology
    steps = list(micro_steps(config, MeshConfig(1, 8, 1), "none", topology))
    assert steps == sorted(steps) and steps[-1] == 128 and steps[0] > 1, "128 windows at a time are too many"
    seven = replace(config, model=replace(config.model, n_layer=32, n_embd=4096, n_head=32))
    assert all(mesh.fsdp * mesh.tensor == 8 for mesh in candidate_meshes(seven, topology))


def test_a_missing_config_is_one_line():
    command = [sys.executable, "-m", "gptjax.plan", "--config", "configs/gpt2_124.py"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "gpt2_124m.py" in result.stderr


@pytest.fixture
def tpu():
    pytest.importorskip("libtpu")


@pytest.mark.slow
def test_the_command_plans_gpt2_for_a_slice(tpu):
    command = [
        sys.executable,
        "-m",
        "gptjax.plan",
        "--config",
        "configs/gpt2_124m.py",
        "--topology",
        "v5e:4x4",
        "--json",
    ]
    result = subprocess.run([*command, "--mesh", "1x16x1"], capture_output=True, text=True, cwd=ROOT, check=True)
    told = json.loads(result.stdout)
    assert told["fits"] and told["hbm_bytes"] < told["hbm_capacity_bytes"] == int(15.75 * 2**30)
    # By hand: without remat the model's own products, 6 N + 6 L D T a token, and no less.
    assert 1.0 <= told["step_flops"] / told["model_flops"] < 1.15
    moved = sum(each["bytes"] for each in told["collectives"])
    assert 1 < moved / (3 * 2 * told["parameters"] * 4) < 3  # two gathers and a scatter of bfloat16 in 4 micro-steps
    assert told["roofline_seconds"] == max(told["seconds"].values())


@pytest.mark.slow
def test_what_does_not_fit_is_said_in_a_line(tpu):
    command = [
        sys.executable,
        "-m",
        "gptjax.plan",
        "--config",
        "configs/gpt2_124m.py",
        "--topology",
        "v5e:2x2",
    ]
    result = subprocess.run([*command, "--train.accumulate", "1"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "DOES NOT FIT" in result.stdout and "Traceback" not in result.stderr


@pytest.mark.slow
def test_no_whole_embedding_and_no_logits_travel(tpu):
    config = replace(without_data(GPT2), mesh=MeshConfig(2, 4, 2), train=TrainConfig(batch_size=64))
    mesh = make_mesh(config.mesh, 64, 0, find_topology("v5e:4x4").devices)
    _, traced = trace_train_step(config, mesh)
    with jax.set_mesh(mesh):
        program = Program(traced.lower().compile().as_text(), 16)
    collectives = program.collectives()
    gathers = [each for each in collectives if each.kind in ("all-gather", "all-to-all")]
    assert len(gathers) > 5
    # The vocabulary is split over tensor: 25,152 rows is the largest part of the embedding that a chip gathers.
    assert not any("50304" in each.shape for each in gathers)
    # A row of logits is as long as the vocabulary, or as a tensor shard of it, and no axis beside it is the width's.
    arrays = [set(dims.split(",")) for each in collectives for dims in re.findall(r"\[([\d,]*)\]", each.shape)]
    assert not any(dims & {"50304", "25152"} and not dims & {"768", "192"} for dims in arrays)
