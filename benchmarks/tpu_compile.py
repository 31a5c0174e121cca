"""What the TPU compiler makes of a step of GPT-2 124M, with no TPU: python -m benchmarks.tpu_compile --model.remat dots

Wants an environment with jax[tpu]. One JSON line: memory of the step as it runs (bytes a chip, from the compiler),
seconds of its compilation, and from it and from two smaller programs the FLOPs and the memory traffic: the compiler
counts the body of a loop once, so these come from steps of one and of two unrolled layers with the loss in one piece.
The kernel of splash attention reports no FLOPs; none are added.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ |= {"TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402

from gptjax import loss  # noqa: E402
from gptjax.config import Config, MeshConfig, ModelConfig, Parser, Section, TrainConfig, option  # noqa: E402
from gptjax.sharding import AXES, batch_sharding, shardings, with_shardings  # noqa: E402
from gptjax.training import init_state, train_step  # noqa: E402


@dataclass(frozen=True)
class Arguments(Section):
    topology: str = option("v5e:4x4", "of the chips, as libtpu names it")
    rows: int = option(8, "windows of 1,024 tokens on each chip of the batch axes")


def compile_step(config: Config, mesh: Mesh, rows: int) -> Any:
    """The train step as it is compiled for a mesh of TPUs."""
    batch = rows * mesh.shape["data"] * mesh.shape["fsdp"]
    config = replace(config, model=config.model.on("tpu"), train=TrainConfig(batch_size=batch))
    abstract = jax.eval_shape(lambda: init_state(config))
    split, whole = shardings(mesh, abstract), NamedSharding(mesh, PartitionSpec())
    shape = (1, batch, config.model.block_size + 1)
    windows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    step = jax.jit(partial(train_step, config), out_shardings=(split, whole), donate_argnums=0)
    with jax.set_mesh(mesh):
        return step.lower(with_shardings(mesh, abstract), windows).compile()


def main() -> None:
    model = ModelConfig(
        vocab_size=50257, n_layer=12, n_head=12, n_embd=768, block_size=1024, bias=False, dtype="bfloat16"
    )
    parser, defaults = (
        Parser("python -m benchmarks.tpu_compile", __doc__),
        Config(model=model, mesh=MeshConfig(1, -1, 1)),
    )
    parser.add_fields(Arguments())
    parser.add_fields(defaults)
    arguments, config = parser.parse(sys.argv[1:], Arguments(), defaults)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
    mesh = Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)
    start = time.perf_counter()
    step = compile_step(config, mesh, arguments.rows)
    seconds, memory = time.perf_counter() - start, step.memory_analysis()
    loss.PIECE_BYTES = 1 << 60
    costs = []
    for n_layer in (1, 2):
        small = replace(config, model=replace(config.model, n_layer=n_layer, layers="unrolled"))
        costs.append(compile_step(small, mesh, arguments.rows).cost_analysis())
    total = {
        key: costs[0][key] + (config.model.n_layer - 1) * (costs[1][key] - costs[0][key])
        for key in ("flops", "bytes accessed")
    }
    print(
        json.dumps(
            {
                "name": f"GPT-2 124M step, {arguments.topology}, {arguments.rows} x 1024 tokens a chip",
                "model": {key: getattr(config.model.on("tpu"), key) for key in ("attention", "layers", "remat")},
                "temporary_bytes": memory.temp_size_in_bytes,
                "argument_bytes": memory.argument_size_in_bytes,
                "compile_seconds": round(seconds, 1),
                "flops": total["flops"],
                "traffic_bytes": total["bytes accessed"],
            }
        )
    )


if __name__ == "__main__":
    main()
