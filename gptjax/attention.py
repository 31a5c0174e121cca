"""Causal attention; shape suffixes as in model.py."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gptjax.sharding import BATCH_AXES

SPLASH_BLOCK = 1024  # queries and keys in a block of the TPU kernel, at most


def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    position_bT: Int[Array, "b T"],
    dropout: Callable[[jax.Array], jax.Array] = lambda weights_BNTS: weights_BNTS,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H) v, where the query at position p sees the keys 0 to p; b is B, or 1 where rows are alike.

    Query heads that follow each other share a key head, N / K of them. Scores and softmax are float32 whatever the
    inputs are; the result has the inputs' dtype. Sources: "Attention Is All You Need", section 3.2.1; "GQA", 2.2.
    """
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    seen_bTS = position_bT[:, :, None] >= jnp.arange(S)[None, None]
    scores_BNTS = jnp.where(seen_bTS[:, None], scores_BKGTS.reshape(B, N, T, S) * H**-0.5, -jnp.inf)
    weights_BNTS = dropout(jax.nn.softmax(scores_BNTS).astype(v_BSKH.dtype))
    y_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BNTS.reshape(B, K, N // K, T, S), v_BSKH)
    return y_BTKGH.reshape(B, T, N, H)


def flash_attention(
    q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"], kind: str
) -> Float[Array, "B T N H"]:
    """`causal_attention` of whole sequences without dropout, by a kernel that never holds T x T scores in memory.

    kind "splash" is Pallas's for TPUs ("FlashAttention-2" in blocks that the mask leaves out where it can), "cudnn"
    NVIDIA's. Each device has its rows and its heads: the kernels know nothing of a mesh.
    """
    kernel = {"splash": _splash, "cudnn": _cudnn}[kind]
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(q_BTNH, k_BTKH, v_BTKH)
    split = PartitionSpec(BATCH_AXES, None, "tensor", None)
    return jax.shard_map(kernel, in_specs=(split, split, split), out_specs=split, check_vma=False)(
        q_BTNH, k_BTKH, v_BTKH
    )


def _splash(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, T, N, H = q_BTNH.shape
    block = math.gcd(T, SPLASH_BLOCK)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * N)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    heads_first = [x.swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKH)]
    return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)


def _cudnn(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")
