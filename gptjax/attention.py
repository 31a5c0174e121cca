"""Causal attention; shape suffixes as in model.py."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
