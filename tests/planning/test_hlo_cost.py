"""FLOPs are those counted by hand; collectives and traffic are those of a program whose text is known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax.config import Config, ModelConfig, TrainConfig
from gptjax.flops import matmul_params, step_flops
from gptjax.planning.hlo_cost import Program, jaxpr_flops, shape_bytes
from gptjax.sharding import one_device
from gptjax.training import state_shapes, trace_train_step, train_step


def flops_of(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_matmuls_count_as_often_as_they_run():
    def looped(x, ws):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]

    assert flops_of(looped, (3, 4), (5, 4, 4)) == 5 * 2 * 3 * 4 * 4
    assert flops_of(jax.jit(looped), (3, 4), (5, 4, 4)) == 5 * 2 * 3 * 4 * 4
    assert flops_of(lambda x, y: jnp.einsum("bij,bkj->bik", x, y), (7, 3, 4), (7, 5, 4)) == 2 * 7 * 3 * 5 * 4
    assert flops_of(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x), (3, 4), (4, 4)) == 192
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
    on_every_device = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    assert flops_of(on_every_device, (16, 4), (4, 4)) == 2 * 16 * 4 * 4


def traced_step(attention, **model):
    """The config of a step of two micro-batches, its FLOPs by its jaxpr, and its parameters."""
    sizes = {"vocab_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8} | model
    model = ModelConfig(attention=attention, dtype="float32", **sizes)
    config = Config(model=model, train=TrainConfig(batch_size=4, accumulate=2))
    state = state_shapes(config)
    windows = jax.ShapeDtypeStruct((2, 2, model.block_size + 1), jnp.int32)
    jaxpr = jax.make_jaxpr(partial(train_step, config))(state, windows).jaxpr
    return config, jaxpr_flops(jaxpr, model.local_window), state.params


def test_a_step_has_the_flops_that_mfu_counts_and_those_of_remat():
    config, counted, params = traced_step("plain", layers="looped")
    assert counted == step_flops(config, params)
    assert traced_step("plain", layers="unrolled")[1] == counted
    tokens, width = 4 * 8 * 2, 16  # tokens times layers
    attention = 2 * 2 * tokens * 8 * width  # scores, and values by weights
    assert traced_step("plain", layers="looped", remat="dots")[1] - counted == attention
    # The layer's matrices but "down", whose result no gradient needs.
    assert traced_step("plain", layers="looped", remat="full")[1] - counted == attention + 2 * tokens * 8 * width**2


def test_frozen_weights_have_no_gradient():
    (_, counted, params), tokens = traced_step("plain", layers="looped"), 4 * 8
    lora = traced_step("plain", layers="looped", lora_rank=3, lora_layers="query,value")[1]
    frozen = 2 * (matmul_params(params) - params["token_embedding"].size) * tokens  # the head's gradient remains
    # Query and value of each layer have two matmuls of rank 3 more, each of them once forward and twice backward.
    assert counted - lora == frozen - 2 * 2 * 2 * 3 * (2 * 16 * 3) * tokens


def test_splash_attention_counts_the_blocks_that_causality_leaves():
    T, D = 2048, 128  # two blocks of queries and of keys: three of the four pairs are left
    _, counted, params = traced_step("splash", layers="looped", block_size=T, n_embd=D)
    matmuls = 6 * matmul_params(params) * 4 * T
    attention = (2 + 5) * 2 * 4 * T * T * D * 2  # 2 matmuls forward, 5 backward: windows x T x T x width x layers
    sums = 2 * 4 * T * D * 2  # of the result times its gradient: a matmul of JAX's outside the kernel
    assert counted == matmuls + sums + attention * 3 / 4


def test_splash_attention_counts_the_blocks_of_a_window():
    whole, local = [
        traced_step("splash", layers="looped", block_size=8192, n_embd=128, n_head=1, window=window)[1]
        for window in (0, 1025)
    ]
    pair = (2 + 5) * 2 * 4 * 1024 * 1024 * 128 * 2  # windows x queries x keys x width x layers
    assert whole - local == (8 * 9 // 2 - (8 + 7)) * pair


def test_collectives_of_a_compiled_program():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

    def step(x):
        def body(x, _):
            whole = jax.lax.all_gather(x, "b", tiled=True)  # [8, 16] from [2, 16]: 3 of 4 parts come from others
            return jax.lax.psum_scatter(jnp.sin(whole), "b", tiled=True) + x, None

        x, _ = jax.lax.scan(body, x, length=5)
        return jax.lax.ppermute(jax.lax.psum(x, "a"), "b", [(i, (i + 1) % 4) for i in range(4)])

    split = P(("a", "b"))
    sharded = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))
    program = Program(sharded.lower(jax.ShapeDtypeStruct((16, 16), jnp.float32)).compile().as_text(), mesh.size)
    found = {each.kind: each for each in program.collectives()}
    size = 2 * 16 * 4
    assert {kind: (each.nbytes, each.times) for kind, each in found.items()} == {
        "all-gather": (3 * size, 5),
        "reduce-scatter": (3 * size, 5),
        "all-reduce": (size, 1),  # to and from one other device, half each way
        "collective-permute": (size, 1),
    }
    assert (found["all-gather"].group, found["all-reduce"].group) == ((0, 1, 2, 3), (0, 4))


def traffic(program):
    return sum(part.nbytes for part in program.breakdown())


def test_traffic_of_a_compiled_program():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 32), (32, 16))]
    program = Program(jax.jit(lambda x, y: (x + 1) @ y).lower(*shapes).compile().as_text(), 1)
    # x is read and x + 1 written; that and y are read, and the product is written.
    assert traffic(program) == 4 * (2 * 64 * 32 + 64 * 32 + 32 * 16 + 64 * 16)


def test_the_breakdown_names_the_parts_of_a_step_and_leaves_nothing_out():
    config, _, _ = traced_step("blockwise", layers="looped")
    _, traced = trace_train_step(config, one_device())
    text = traced.lower().compile().as_text()
    program = Program(text, 1)
    parts = {part.name: part for part in program.breakdown()}
    assert {"attention, forward", "attention, backward", "mlp, forward", "mlp, backward", "optimizer"} <= parts.keys()
    layer = 4 * 3 * 16 * 64  # bytes that the MLP's up and down read at least in each of 2 layers and 2 micro-steps
    assert parts["mlp, forward"].nbytes > 2 * 2 * layer and parts["mlp, forward"].times >= 2 * 2 * 2
    assert sum(part.nbytes for part in program.breakdown(similar=True)) == traffic(program)
    without = {part.name: part for part in Program(text, 1, excluded="/mlp/").breakdown()}
    assert "mlp, forward" not in without and without["loss"] == parts["loss"]


COPIES = """HloModule step

ENTRY %main (a: f32[8], b: f32[8]) -> (f32[8], f32[8]) {
  %a = f32[8]{0} parameter(0), metadata={op_name="a"}
  %b = f32[8]{0} parameter(1), metadata={op_name="b"}
  %copy.1 = f32[8]{0} copy(%a)
  %view = f32[8]{0} bitcast(%copy.1)
  %kernel = f32[8]{0} negate(%view), metadata={op_name="step/attention/kernel/neg"}
  %copy.2 = f32[8]{0} copy(%kernel)
  %copy.3 = f32[8]{0} copy(%b)
  %other = f32[8]{0} add(%copy.2, %copy.3), metadata={op_name="step/mlp/add"}
  ROOT %both = (f32[8]{0}, f32[8]{0}) tuple(%other, %copy.3)
}
"""


def test_copies_that_a_compiler_adds_for_what_is_excluded_are_excluded_too():
    assert traffic(Program(COPIES, 1)) == 32 * (2 + 2 + 2 + 2 + 3)
    assert traffic(Program(COPIES, 1, excluded="/attention/kernel/")) == 32 * (2 + 3)


# In the form of the TPU compiler's text: a loop whose number of trips is not noted, an all-gather that is spread over a
# chain of fusions, an array in on-chip memory (S(1)), and stacks of layers of which each trip reads or writes one.
# ruff: noqa: E501
TPU = """HloModule jit_step

%slice_fusion (param_0: bf16[12,8,128], param_1: s32[]) -> bf16[1,8,128] {
  %param_0 = bf16[12,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  ROOT %dynamic-slice.1 = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1, %param_1, %param_1)
}
%update_fusion (param_0.1: bf16[12,8,128], param_1.1: bf16[1,8,128], param_2.1: s32[]) -> bf16[12,8,128] {
  %param_0.1 = bf16[12,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param_2.1 = s32[]{:T(128)} parameter(2)
  ROOT %dynamic-update-slice.1 = bf16[12,8,128]{2,1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2.1)
}
%first_fusion (param_0.2: bf16[2,128]) -> (bf16[8,128]) {
  %param_0.2 = bf16[2,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%param_0.2), channel_id=6, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, frontend_attributes={chain_id="9"}
  ROOT %custom-call.1 = (bf16[8,128]{1,0:T(8,128)(2,1)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}
%last_fusion (param_0.3: bf16[2,128]) -> bf16[8,128] {
  %param_0.3 = bf16[2,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.2 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%param_0.3), channel_id=6, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, frontend_attributes={chain_id="9"}
  ROOT %custom-call.2 = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%param_0.3, %all-gather.2), custom_call_target="AsyncCollectiveDone"
}
%scatter_fusion (param_0.4: f32[8,128]) -> f32[1,128] {
  %param_0.4 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%param_0.4), replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0','axis_1'}, to_apply=%add
  %constant.9 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.2 = f32[1,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %constant.9, %constant.9)
}
%body (carry: (s32[], bf16[12,8,128], bf16[12,8,128], bf16[2,128])) -> (s32[], bf16[12,8,128], bf16[12,8,128], bf16[2,128]) {
  %carry = (s32[]{:T(128)}, bf16[12,8,128]{2,1,0}, bf16[12,8,128]{2,1,0}, bf16[2,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %weights = bf16[12,8,128]{2,1,0} get-tuple-element(%carry), index=1
  %kept = bf16[12,8,128]{2,1,0} get-tuple-element(%carry), index=2
  %part = bf16[2,128]{1,0} get-tuple-element(%carry), index=3
  %one = bf16[1,8,128]{2,1,0:T(8,128)(2,1)S(1)} fusion(%weights, %i), kind=kLoop, calls=%slice_fusion
  %start = (bf16[8,128]{1,0}) fusion(%part), kind=kCustom, calls=%first_fusion
  %done = bf16[8,128]{1,0} fusion(%part), kind=kCustom, calls=%last_fusion
  %new = bf16[12,8,128]{2,1,0} fusion(%kept, %one, %i), kind=kLoop, calls=%update_fusion
  %next = s32[]{:T(128)S(1)} add(%i, %i)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[12,8,128]{2,1,0}, bf16[12,8,128]{2,1,0}, bf16[2,128]{1,0}) tuple(%next, %weights, %new, %part)
}
%condition (carry.1: (s32[], bf16[12,8,128], bf16[12,8,128], bf16[2,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %carry.1 = (s32[]{:T(128)}, bf16[12,8,128]{2,1,0}, bf16[12,8,128]{2,1,0}, bf16[2,128]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}
ENTRY %main (p0: (s32[], bf16[12,8,128], bf16[12,8,128], bf16[2,128]), p1: f32[8,128]) -> f32[1,128] {
  %p0 = (s32[]{:T(128)}, bf16[12,8,128]{2,1,0}, bf16[12,8,128]{2,1,0}, bf16[2,128]{1,0}) parameter(0)
  %p1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %while.1 = (s32[]{:T(128)}, bf16[12,8,128]{2,1,0}, bf16[12,8,128]{2,1,0}, bf16[2,128]{1,0}) while(%p0), condition=%condition, body=%body, metadata={op_name="jit(step)/jvp(GPT.hidden)/while"}
  %token = token[] after-all()
  %sent = (f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%p1, %token), channel_id=7, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1:2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %scattered = f32[1,128]{1,0:T(8,128)} fusion(%p1), kind=kCustom, calls=%scatter_fusion
}
"""


def test_a_tpu_program_is_read():
    program = Program(TPU, 8)
    assert program.runs == {"main": 1, "body": 12}
    gather, between_slices, scatter = sorted(program.collectives(), key=lambda each: each.kind)
    assert (between_slices.kind, between_slices.nbytes, between_slices.group) == ("all-reduce", 8 * 128 * 4, (0, 4))
    assert gather == ("all-gather", "bf16[8,128]", 3 * 2 * 128 * 2, (0, 2, 4, 6), 12)
    assert (scatter.kind, scatter.nbytes, scatter.times) == ("reduce-scatter", 8 * 128 * 4 * 7 / 8, 1)
    assert scatter.group == (0, 2, 4, 6, 1, 3, 5, 7)
    # A trip reads a layer, whose copy stays on the chip, and writes one, each by a counter; the entry sends and scatters
    # p1.
    stacks, scattered = 2 * (8 * 128 * 2 + 4), 2 * 8 * 128 * 4 + 128 * 4
    gathered = traffic(program) - 12 * stacks - scattered  # at most: both fusions read a part, one writes the whole
    assert 0 <= gathered <= 12 * (2 * 2 * 128 * 2 + 8 * 128 * 2)


def test_bytes_of_shapes():
    assert shape_bytes("(f32[2,3]{1,0}, bf16[4], pred[], u32[]{:S(2)})") == 24 + 8 + 1 + 4
    assert shape_bytes("(f32[2,3]{1,0:T(8,128)S(1)}, s8[5]{0})", hbm_only=True) == 5
