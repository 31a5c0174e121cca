"""Causal attention; shape suffixes as in model.py."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gptjax.products import multiply
from gptjax.sharding import BATCH_AXES, mesh_in_use

SPLASH_BLOCK = 1024  # queries and keys in a block of the TPU kernel, at most
BLOCK = 256  # the same of blockwise attention
LOW = -1e30  # a score that a later one makes nothing of; of -inf a block that is all masked would make nan


def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    dropout: Callable[[jax.Array], jax.Array] = lambda weights_BNTS: weights_BNTS,
    document_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H) v, where the query at a place sees the keys up to it, with documents those of its own alone.

    Query heads that follow each other share a key head, N / K of them. Scores and softmax are float32 whatever the
    inputs are; the result and the gradients' products have the inputs' dtype. Sources: "Attention Is All You Need",
    section 3.2.1; "GQA", 2.2.
    """
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    q_BKQH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3).reshape(B, K, -1, H)
    scores_BKQS = multiply(q_BKQH, jnp.moveaxis(k_BTKH, 1, 3), jnp.float32)
    seen_bTS = jnp.tril(jnp.ones((1, T, T), bool))
    if document_BT is not None:
        seen_bTS &= document_BT[:, :, None] == document_BT[:, None]
    scores_BNTS = jnp.where(seen_bTS[:, None], scores_BKQS.reshape(B, N, T, T) * H**-0.5, -jnp.inf)
    weights_BNTS = dropout(jax.nn.softmax(scores_BNTS).astype(v_BTKH.dtype))
    y_BKQH = multiply(weights_BNTS.reshape(B, K, -1, T), jnp.moveaxis(v_BTKH, 1, 2))
    return jnp.moveaxis(y_BKQH.reshape(B, N, T, H), 1, 2)


def cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    keys_JSH: Float[Array, "J S H"],
    values_JHS: Float[Array, "J H S"],
    position_bT: Int[Array, "b T"],
) -> Float[Array, "B T N H"]:
    """`causal_attention` of a cache, whose keys and values lie as their products read them.

    The query at position p sees the keys 0 to p; Q are the N / K x T queries that share a key head.
    """
    (B, T, N, H), (J, S, _) = q_BTNH.shape, keys_JSH.shape
    K = J // B
    q_JQH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3).reshape(J, -1, H)
    scores_JQS = jnp.einsum("JQH,JSH->JQS", q_JQH, keys_JSH, preferred_element_type=jnp.float32)
    seen_bTS = position_bT[:, :, None] >= jnp.arange(S)[None, None]
    scores_BNTS = jnp.where(seen_bTS[:, None], scores_JQS.reshape(B, N, T, S) * H**-0.5, -jnp.inf)
    weights_JQS = jax.nn.softmax(scores_BNTS).astype(values_JHS.dtype).reshape(J, -1, S)
    y_JQH = jnp.einsum("JQS,JHS->JQH", weights_JQS, values_JHS)
    return jnp.moveaxis(y_JQH.reshape(B, N, T, H), 1, 2)


def sequence_attention(
    kind: str,
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    document_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """`causal_attention` of whole sequences without dropout, with never all of T x T scores in memory.

    kind "blockwise" is plain but for that, "splash" Pallas's kernel for TPUs ("FlashAttention-2" in blocks that the
    mask leaves out where it can), "cudnn" NVIDIA's, which knows no documents. Each device has its rows and its heads:
    the kernels know nothing of a mesh.
    """
    kernel = {"blockwise": _blockwise, "splash": _splash, "cudnn": _cudnn}[kind]
    if mesh_in_use().empty:
        return kernel(q_BTNH, k_BTKH, v_BTKH, document_BT)
    split, rows = PartitionSpec(BATCH_AXES, None, "tensor", None), PartitionSpec(BATCH_AXES)
    return jax.shard_map(kernel, in_specs=(split, split, split, rows), out_specs=split, check_vma=False)(
        q_BTNH, k_BTKH, v_BTKH, document_BT
    )


def _blockwise(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, document_BT: Any) -> jax.Array:
    """The pairs of a block of queries and a block of keys that causality leaves, one after the other.

    In blocks' names P counts them, t is the place in a block of queries, s in one of keys, G the heads of a group.
    """
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    size = min(BLOCK, T)
    padding = -T % size  # behind all queries, so that none sees it

    def blocks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    q_PBtKGH = blocks(q_BTNH.reshape(B, T, K, N // K, H))
    document_PBt = None if document_BT is None else blocks(document_BT)
    y_PBtKGH = _attend_blocks(q_PBtKGH, blocks(k_BTKH), blocks(v_BTKH), document_PBt)
    return jnp.moveaxis(y_PBtKGH, 0, 1).reshape(B, T + padding, N, H)[:, :T]


@jax.custom_vjp
def _attend_blocks(q_PBtKGH: Any, k_PBsKH: Any, v_PBsKH: Any, document_PBt: Any) -> Any:
    return _attend_forward(q_PBtKGH, k_PBsKH, v_PBsKH, document_PBt)[0]


def _block_scores(arrays: Any, i: Any, j: Any) -> jax.Array:
    """Scores of the queries of block i by the keys of block j, very low where the one does not see the other."""
    q_PBtKGH, k_PBsKH, _, document_PBt = arrays
    place_t = jnp.arange(k_PBsKH.shape[2])
    seen_1ts = ((i - j) * len(place_t) + place_t[:, None] >= place_t[None])[None]
    if document_PBt is not None:
        seen_1ts &= document_PBt[i][:, :, None] == document_PBt[j][:, None]
    scores = jnp.einsum("BtKGH,BsKH->BKGts", q_PBtKGH[i], k_PBsKH[j], preferred_element_type=jnp.float32)
    return jnp.where(seen_1ts[:, None, None], scores * q_PBtKGH.shape[-1] ** -0.5, LOW)


def _attend_forward(*arrays: Any) -> Any:
    """ "FlashAttention-2", algorithm 1: softmax from a running maximum and a running sum of each query's scores."""
    q_PBtKGH, _, v_PBsKH, _ = arrays
    P, B, t, K, G, H = q_PBtKGH.shape

    def pair(carry: Any, ij: Any) -> Any:
        (most, total, y), (i, j) = carry, ij
        scores_BKGts = _block_scores(arrays, i, j)
        most_BKGt = jnp.maximum(most[i], jnp.max(scores_BKGts, axis=-1))
        weights_BKGts = jnp.exp(scores_BKGts - most_BKGt[..., None])
        kept_BKGt = jnp.exp(most[i] - most_BKGt)
        part = weights_BKGts.astype(v_PBsKH.dtype)
        part_BKGtH = jnp.einsum("BKGts,BsKH->BKGtH", part, v_PBsKH[j], preferred_element_type=jnp.float32)
        total_BKGt = total[i] * kept_BKGt + jnp.sum(weights_BKGts, axis=-1)
        y_BKGtH = y[i] * kept_BKGt[..., None] + part_BKGtH
        return (most.at[i].set(most_BKGt), total.at[i].set(total_BKGt), y.at[i].set(y_BKGtH)), None

    rows = (P, B, K, G, t)
    start = (jnp.full(rows, LOW), jnp.zeros(rows), jnp.zeros((*rows, H)))
    (most, total, y), _ = jax.lax.scan(pair, start, _pairs(P))
    y_PBtKGH = jnp.moveaxis(y / total[..., None], 4, 2).astype(q_PBtKGH.dtype)
    return y_PBtKGH, (arrays, y_PBtKGH, most + jnp.log(total))


def _attend_backward(kept: Any, dy_PBtKGH: Any) -> Any:
    """ "FlashAttention-2", algorithm 2: each pair's weights once more, from the logarithm of their sum."""
    arrays, y_PBtKGH, log_total = kept
    q_PBtKGH, k_PBsKH, v_PBsKH, _ = arrays
    scale, dtype = q_PBtKGH.shape[-1] ** -0.5, q_PBtKGH.dtype
    along = jnp.sum(y_PBtKGH.astype(jnp.float32) * dy_PBtKGH.astype(jnp.float32), axis=-1)
    along_PBKGt = jnp.moveaxis(along, 2, 4)
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def pair(carry: Any, ij: Any) -> Any:
        (dq, dk, dv), (i, j) = carry, ij
        weights = jnp.exp(_block_scores(arrays, i, j) - log_total[i][..., None])
        dv = dv.at[j].add(einsum("BKGts,BtKGH->BsKH", weights.astype(dtype), dy_PBtKGH[i]))
        dweights = einsum("BtKGH,BsKH->BKGts", dy_PBtKGH[i], v_PBsKH[j])
        dscores = (weights * (dweights - along_PBKGt[i][..., None]) * scale).astype(dtype)
        dk = dk.at[j].add(einsum("BKGts,BtKGH->BsKH", dscores, q_PBtKGH[i]))
        return (dq.at[i].add(einsum("BKGts,BsKH->BtKGH", dscores, k_PBsKH[j])), dk, dv), None

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in arrays[:3]]
    gradients, _ = jax.lax.scan(pair, tuple(zeros), _pairs(len(q_PBtKGH)))
    return *[gradient.astype(x.dtype) for gradient, x in zip(gradients, arrays[:3], strict=True)], None


_attend_blocks.defvjp(_attend_forward, _attend_backward)


def _pairs(n_blocks: int) -> tuple[jax.Array, jax.Array]:
    i, j = np.tril_indices(n_blocks)
    return jnp.asarray(i, jnp.int32), jnp.asarray(j, jnp.int32)


def _splash(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, document_BT: Any) -> jax.Array:
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
    documents = None if document_BT is None else splash.SegmentIds(document_BT, document_BT)
    return jax.vmap(kernel)(*heads_first, documents).swapaxes(1, 2)


def _cudnn(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, document_BT: None) -> jax.Array:
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")
