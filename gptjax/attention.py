"""Causal attention: plain, with a KV cache, blockwise, and by the kernels of TPUs and GPUs.

Shapes as in model.py. In blockwise attention P counts blocks and t is the position in one, so Q = t N / K there.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gptjax.errors import UserError, first_line
from gptjax.matmul import matmul
from gptjax.sharding import BATCH_AXES, mesh_in_use

SPLASH_BLOCK = 1024  # queries, and keys, in a block of the TPU kernel at most
BLOCK = 256  # queries, and keys, in a block of blockwise attention at most
MASKED = -1e30  # the score of a masked key; a block of nothing but -inf would give nan


def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    dropout: Callable[[jax.Array], jax.Array] = lambda weights_BNTS: weights_BNTS,
    document_BT: Int[Array, "B T"] | None = None,
    window: int = 0,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H) v, where a query attends to the keys up to its own position, within its document.

    With a window other than 0 it attends to the last `window` of them. Each group of N / K consecutive query heads
    shares a key head. Scores and softmax are float32; the result and the gradients' matmuls have the inputs' dtype.
    Sources: "Attention Is All You Need", section 3.2.1; "GQA", 2.2; "Longformer", 3.1 (the window).
    """
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    q_BKQH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3).reshape(B, K, -1, H)
    scores_BKQS = matmul(q_BKQH, jnp.moveaxis(k_BTKH, 1, 3), jnp.float32)
    visible_bTS = jnp.tril(jnp.ones((1, T, T), bool))
    if window:
        visible_bTS = jnp.triu(visible_bTS, 1 - window)
    if document_BT is not None:
        visible_bTS &= document_BT[:, :, None] == document_BT[:, None]
    scores_BNTS = jnp.where(visible_bTS[:, None], scores_BKQS.reshape(B, N, T, T) * H**-0.5, -jnp.inf)
    weights_BNTS = dropout(jax.nn.softmax(scores_BNTS).astype(v_BTKH.dtype))
    y_BKQH = matmul(weights_BNTS.reshape(B, K, -1, T), jnp.moveaxis(v_BTKH, 1, 2))
    return jnp.moveaxis(y_BKQH.reshape(B, N, T, H), 1, 2)


def cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    keys_JSH: Float[Array, "J S H"],
    values_JHS: Float[Array, "J H S"],
    position_bT: Int[Array, "b T"],
    window: int = 0,
) -> Float[Array, "B T N H"]:
    """`causal_attention` over a KV cache: a query at position p attends to the keys 0 to p, or the last `window`."""
    (B, T, N, H), (J, S, _) = q_BTNH.shape, keys_JSH.shape
    K = J // B
    q_JQH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3).reshape(J, -1, H)
    scores_JQS = jnp.einsum("JQH,JSH->JQS", q_JQH, keys_JSH, preferred_element_type=jnp.float32)
    position_bT1, key_11S = position_bT[:, :, None], jnp.arange(S)[None, None]
    visible_bTS = position_bT1 >= key_11S
    if window:
        visible_bTS &= position_bT1 - key_11S < window
    # A query behind the cache's end, whose token `generate` drops, may see no key in its window: it must not write nan.
    scores_BNTS = jnp.where(visible_bTS[:, None], scores_JQS.reshape(B, N, T, S) * H**-0.5, MASKED)
    weights_JQS = jax.nn.softmax(scores_BNTS).astype(values_JHS.dtype).reshape(J, -1, S)
    y_JQH = jnp.einsum("JQS,JHS->JQH", weights_JQS, values_JHS)
    return jnp.moveaxis(y_JQH.reshape(B, N, T, H), 1, 2)


@jax.named_scope("kernel")
def sequence_attention(
    kind: str,
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    document_BT: Int[Array, "B T"] | None = None,
    window: int = 0,
) -> Float[Array, "B T N H"]:
    """`causal_attention` of whole sequences without dropout, which never holds all T x T scores.

    "blockwise" runs on any hardware, "splash" is Pallas's kernel for TPUs and "cudnn" NVIDIA's, which supports no
    documents. Each device runs the kernel on its own rows and heads.
    """
    kernel = partial({"blockwise": _blockwise, "splash": _splash, "cudnn": _cudnn}[kind], window)
    if mesh_in_use().empty:
        return kernel(q_BTNH, k_BTKH, v_BTKH, document_BT)
    split, rows = PartitionSpec(BATCH_AXES, None, "tensor", None), PartitionSpec(BATCH_AXES)
    return jax.shard_map(kernel, in_specs=(split, split, split, rows), out_specs=split, check_vma=False)(
        q_BTNH, k_BTKH, v_BTKH, document_BT
    )


def _blockwise(window: int, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, document_BT: Any) -> jax.Array:
    """ "FlashAttention-2" in JAX: a loop over the pairs of a query block and a key block that are not masked whole."""
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    size = min(BLOCK, T)
    padding = -T % size  # after all queries, so the causal mask hides it

    def blocks(x: jax.Array) -> jax.Array:
        """[B, T, ...] as [P, B, ..., t], with features still last."""
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), (1, 2), (0, max(2, x.ndim - 1)))

    q_PBKQH = blocks(q_BTNH.reshape(B, T, K, N // K, H)).reshape(-1, B, K, N // K * size, H)
    document_PBt = None if document_BT is None else blocks(document_BT)
    y_PBKQH = _attend_blocks(window, q_PBKQH, blocks(k_BTKH), blocks(v_BTKH), document_PBt)
    y_PBNtH = y_PBKQH.reshape(-1, B, N, size, H)
    return jnp.moveaxis(y_PBNtH, (0, 3), (1, 2)).reshape(B, T + padding, N, H)[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_blocks(window: int, q_PBKQH: Any, k_PBKtH: Any, v_PBKtH: Any, document_PBt: Any) -> Any:
    return _attend_forward(window, q_PBKQH, k_PBKtH, v_PBKtH, document_PBt)[0]


def _block_scores(window: int, arrays: Any, i: Any, j: Any) -> jax.Array:
    """Scores of the queries of block i with the keys of block j, MASKED where a query does not attend to a key."""
    q_PBKQH, k_PBKtH, _, document_PBt = arrays
    position_t = jnp.arange(k_PBKtH.shape[3])
    n_sharing = q_PBKQH.shape[3] // len(position_t)  # query heads that share a key head
    position_Q = jnp.tile(position_t, n_sharing)
    distance_Qt = (i - j) * len(position_t) + position_Q[:, None] - position_t[None]
    visible_1Qt = (distance_Qt >= 0)[None]
    if window:
        visible_1Qt &= (distance_Qt < window)[None]
    if document_PBt is not None:
        visible_1Qt &= jnp.tile(document_PBt[i], (1, n_sharing))[:, :, None] == document_PBt[j][:, None]
    scores_BKQt = matmul(q_PBKQH[i], k_PBKtH[j].mT, jnp.float32)
    return jnp.where(visible_1Qt[:, None], scores_BKQt * q_PBKQH.shape[-1] ** -0.5, MASKED)


def _attend_forward(window: int, *arrays: Any) -> Any:
    """ "FlashAttention-2", algorithm 1: softmax from a running maximum and a running sum of each query's scores."""
    q_PBKQH, _, v_PBKtH, _ = arrays

    def pair(carry: Any, ij: Any) -> Any:
        (maximum, total, y), (i, j) = carry, ij
        scores_BKQt = _block_scores(window, arrays, i, j)
        max_BKQ = jnp.maximum(maximum[i], jnp.max(scores_BKQt, axis=-1))
        weights_BKQt = jnp.exp(scores_BKQt - max_BKQ[..., None])
        kept_BKQ = jnp.exp(maximum[i] - max_BKQ)
        part_BKQH = matmul(weights_BKQt.astype(v_PBKtH.dtype), v_PBKtH[j], jnp.float32)
        total_BKQ = total[i] * kept_BKQ + jnp.sum(weights_BKQt, axis=-1)
        y_BKQH = y[i] * kept_BKQ[..., None] + part_BKQH
        return (maximum.at[i].set(max_BKQ), total.at[i].set(total_BKQ), y.at[i].set(y_BKQH)), None

    rows = q_PBKQH.shape[:-1]
    start = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros(q_PBKQH.shape))
    (maximum, total, y), _ = jax.lax.scan(pair, start, block_pairs(len(v_PBKtH), v_PBKtH.shape[3], window))
    y_PBKQH = (y / total[..., None]).astype(q_PBKQH.dtype)
    return y_PBKQH, (arrays, y_PBKQH, maximum + jnp.log(total))


def _attend_backward(window: int, kept: Any, dy_PBKQH: Any) -> Any:
    """ "FlashAttention-2", algorithm 2: each pair's weights again, from the logarithm of their sum."""
    arrays, y_PBKQH, log_total = kept
    q_PBKQH, k_PBKtH, v_PBKtH, _ = arrays
    scale, dtype = q_PBKQH.shape[-1] ** -0.5, q_PBKQH.dtype
    along_PBKQ = jnp.sum(y_PBKQH.astype(jnp.float32) * dy_PBKQH.astype(jnp.float32), axis=-1)

    def pair(carry: Any, ij: Any) -> Any:
        (dq, dk, dv), (i, j) = carry, ij
        weights = jnp.exp(_block_scores(window, arrays, i, j) - log_total[i][..., None])
        dv = dv.at[j].add(matmul(weights.astype(dtype).mT, dy_PBKQH[i], jnp.float32))
        dweights = matmul(dy_PBKQH[i], v_PBKtH[j].mT, jnp.float32)
        dscores = (weights * (dweights - along_PBKQ[i][..., None]) * scale).astype(dtype)
        dk = dk.at[j].add(matmul(dscores.mT, q_PBKQH[i], jnp.float32))
        return (dq.at[i].add(matmul(dscores, k_PBKtH[j], jnp.float32)), dk, dv), None

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in arrays[:3]]
    gradients, _ = jax.lax.scan(pair, tuple(zeros), block_pairs(len(v_PBKtH), v_PBKtH.shape[3], window))
    return *[gradient.astype(x.dtype) for gradient, x in zip(gradients, arrays[:3], strict=True)], None


_attend_blocks.defvjp(_attend_forward, _attend_backward)


def block_pairs(n_blocks: int, size: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Each block of `size` queries and, in order of their places, the blocks of keys that some of them attend to."""
    i, j = np.tril_indices(n_blocks)
    if window:
        near = (i - j - 1) * size + 1 < window  # the distance of a block's first query and another's last key
        i, j = i[near], j[near]
    return i.astype(np.int32), j.astype(np.int32)


def _splash(window: int, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, document_BT: Any) -> jax.Array:
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
    causal = splash.LocalMask((T, T), (window - 1, 0), offset=0) if window else splash.CausalMask((T, T))
    mask = splash.MultiHeadMask([causal] * N)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    heads_first = [x.swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKH)]
    documents = None if document_BT is None else splash.SegmentIds(document_BT, document_BT)
    return jax.vmap(kernel)(*heads_first, documents).swapaxes(1, 2)


def _cudnn(window: int, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, document_BT: None) -> jax.Array:
    options: dict[str, Any] = {"is_causal": True, "local_window_size": (window - 1, 0) if window else None}
    try:
        return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, **options, implementation="cudnn")
    except (NotImplementedError, RuntimeError, ValueError) as error:  # by this GPU, or without cuDNN
        raise UserError(f"cuDNN refuses attention: {first_line(error)} Pass --model.attention blockwise") from error
