"""Causal attention; shape suffixes as in model.py."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSNH: Float[Array, "B S N H"],
    v_BSNH: Float[Array, "B S N H"],
    offset: int | Int[Array, ""] = 0,
    dropout: Callable[[jax.Array], jax.Array] = lambda weights_BNTS: weights_BNTS,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H) v, where query t stands at position offset + t and sees the keys 0 to offset + t.

    Scores and softmax are float32 whatever the inputs are; the result has the inputs' dtype.
    Source: "Attention Is All You Need", section 3.2.1.
    """
    length_T, length_S, width_H = q_BTNH.shape[1], k_BSNH.shape[1], q_BTNH.shape[-1]
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32)
    seen_TS = (offset + jnp.arange(length_T))[:, None] >= jnp.arange(length_S)[None, :]
    scores_BNTS = jnp.where(seen_TS[None, None], scores_BNTS * width_H**-0.5, -jnp.inf)
    weights_BNTS = dropout(jax.nn.softmax(scores_BNTS).astype(v_BSNH.dtype))
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)
