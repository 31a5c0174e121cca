"""GPT-2's decoder in Flax linen: pure math, nothing about devices but the names of the axes that are split.

Every local array carries its shape in its name:
    B batch    T query length    S key length    D model width    L layers
    N heads    H head width      F MLP width     V vocabulary (padded)
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.attention import causal_attention
from gptjax.config import ModelConfig
from gptjax.sharding import constrain_batch

INIT_STD = 0.02  # GPT-2's code; section 2.3 of its paper adds 1/sqrt(number of residual branches)


class KVCache(NamedTuple):
    """Keys and values of the positions read so far: [L, B, S, N, H], and without L inside a layer.

    What lies beyond those positions is unspecified: the causal mask hides it until it is overwritten.
    """

    keys: jax.Array
    values: jax.Array


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, cache: KVCache | None, offset: Any) -> tuple[jax.Array, KVCache | None]:
        heads = (self.config.n_head, self.config.n_embd // self.config.n_head)
        q_BTNH = _linear(self.config, heads, name="query")(x_BTD)
        k_BSNH = _linear(self.config, heads, name="key")(x_BTD)
        v_BSNH = _linear(self.config, heads, name="value")(x_BTD)
        if cache is not None:
            k_BSNH = jax.lax.dynamic_update_slice(cache.keys, k_BSNH, (0, offset, 0, 0))
            v_BSNH = jax.lax.dynamic_update_slice(cache.values, v_BSNH, (0, offset, 0, 0))
            cache = KVCache(k_BSNH, v_BSNH)
        y_BTNH = causal_attention(q_BTNH, k_BSNH, v_BSNH, offset, _Dropout(self.config.dropout))
        y_BTD = _linear(self.config, self.config.n_embd, axis=(-2, -1), residual=True, name="out")(y_BTNH)
        return _Dropout(self.config.dropout)(y_BTD), cache


class MLP(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTF = _linear(self.config, 4 * self.config.n_embd, name="up")(x_BTD)
        h_BTF = nn.gelu(h_BTF, approximate=True)  # GPT-2's tanh form; nanoGPT has erf, 3e-4 away at most
        y_BTD = _linear(self.config, self.config.n_embd, residual=True, name="down")(h_BTF)
        return _Dropout(self.config.dropout)(y_BTD)


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, cache: KVCache | None, offset: Any) -> tuple[jax.Array, KVCache | None]:
        y_BTD, cache = Attention(self.config, name="attention")(
            _norm(self.config, name="attention_norm")(x_BTD), cache, offset
        )
        x_BTD = x_BTD + y_BTD
        x_BTD = x_BTD + MLP(self.config, name="mlp")(_norm(self.config, name="mlp_norm")(x_BTD))
        return constrain_batch(x_BTD), cache


class GPT(nn.Module):
    """GPT-2: token and learned position embeddings, pre-norm blocks, a head tied to the token embedding.

    Parameters are float32; activations have `config.dtype`; softmax, norm statistics and logits are float32.
    Dropout is on exactly where `apply` is given a "dropout" rng. Layers run unrolled, but their parameters are
    stacked along a leading layer axis, so that the tree is the same however they run.
    """

    config: ModelConfig

    def setup(self) -> None:
        config, init = self.config, nn.initializers.normal(INIT_STD)
        self.token_embedding = self.param("token_embedding", init, (config.padded_vocab_size, config.n_embd))
        self.position_embedding = self.param("position_embedding", init, (config.block_size, config.n_embd))
        self.embedding_dropout = _Dropout(config.dropout)
        self.layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=config.n_layer,
            unroll=config.n_layer,
        )(config)
        self.final_norm = _norm(config)

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the token that follows each place; those of padded ids are -inf."""
        return self.logits(self.hidden(tokens_BT)[0])

    def hidden(
        self, tokens_BT: Int[Array, "B T"], cache: KVCache | None = None, offset: int | Int[Array, ""] = 0
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The normalized residual stream after the last block, with tokens_BT at positions offset, offset + 1, ...

        A cache holds the keys and values of positions before `offset`; the new one holds these tokens' too.
        """
        dtype, length_T = self.config.dtype, tokens_BT.shape[1]
        position_TD = jax.lax.dynamic_slice_in_dim(self.position_embedding, offset, length_T)
        x_BTD = jnp.take(self.token_embedding, tokens_BT, axis=0) + position_TD[None]
        x_BTD = constrain_batch(self.embedding_dropout(x_BTD.astype(dtype)))
        x_BTD, cache = self.layers(x_BTD, cache, offset)
        return self.final_norm(x_BTD), cache

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits over the padded vocabulary: -inf at padded ids, which so are neither sampled nor scored."""
        head_VD = self.token_embedding.astype(self.config.dtype)
        logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, head_VD, preferred_element_type=jnp.float32)
        if self.config.padded_vocab_size == self.config.vocab_size:
            return logits_BTV
        real_V = jnp.arange(self.config.padded_vocab_size) < self.config.vocab_size
        return jnp.where(real_V[None, None], logits_BTV, -jnp.inf)


def init_cache(config: ModelConfig, batch_size: int, length: int) -> KVCache:
    """An empty cache for `batch_size` sequences of up to `length` tokens, in the activations' dtype."""
    shape = (config.n_layer, batch_size, length, config.n_head, config.n_embd // config.n_head)
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def _linear(
    config: ModelConfig,
    features: int | tuple[int, ...],
    name: str,
    axis: int | tuple[int, ...] = -1,
    residual: bool = False,
) -> nn.Module:
    """A linear layer; those that write to the residual stream start smaller by sqrt(2 L), the number of them."""
    std = INIT_STD * (2 * config.n_layer) ** -0.5 if residual else INIT_STD
    return nn.DenseGeneral(
        features,
        axis,
        use_bias=config.bias,
        dtype=config.dtype,
        kernel_init=nn.initializers.normal(std),
        dot_general=_matmul,
        name=name,
    )


def _matmul(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None) -> jax.Array:
    """The last axes of x times the first of the kernel, as one product of two matrices.

    With [B, T, D] as it is, XLA on CPUs transposes the gradient of [B, T, F], which took a quarter of a step.
    """
    n_contracted = len(dimension_numbers[0][0])
    n_in = math.prod(kernel.shape[:n_contracted])
    y = x.reshape(-1, n_in) @ kernel.reshape(n_in, -1)
    return y.reshape(*x.shape[: x.ndim - n_contracted], *kernel.shape[n_contracted:])


def _norm(config: ModelConfig, name: str | None = None) -> nn.Module:
    """LayerNorm with GPT-2's epsilon (Flax's own default is 1e-6)."""
    return nn.LayerNorm(epsilon=1e-5, use_bias=config.bias, dtype=config.dtype, name=name)


class _Dropout(nn.Module):
    """Dropout that is on exactly where a "dropout" rng is given."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(x)
