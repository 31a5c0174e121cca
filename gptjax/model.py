"""The decoder in Flax linen: GPT-2, Llama and Qwen2.5 as fields of one config, and pure math.

Nothing here knows of devices, but for the names of the axes that are split. Every local array carries its shape in
its name:
    B batch (b: B, or 1 where rows are alike)    T query length    S key length    D model width    L layers
    N heads    K key/value heads    M N + 2 K    J B K    Q N / K x T    H head width    F MLP width
    V vocabulary (padded)
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gptjax.attention import cached_attention, causal_attention, sequence_attention
from gptjax.config import ModelConfig
from gptjax.inference import quantize as matrices
from gptjax.inference.quantize import MATRICES, Int8
from gptjax.matmul import multiply
from gptjax.sharding import constrain, gathered

INIT_STD = 0.02  # GPT-2's code; section 2.3 of its paper adds 1/sqrt(number of residual branches)
ROPE_LOW, ROPE_HIGH = 1.0, 4.0  # Llama 3: wavelengths in the original context below which, above which scaling changes
PRODUCT = "product"  # what the backward pass keeps where all but matrix products is computed again
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu_erf": lambda x: nn.gelu(x, approximate=False),  # at most 5e-4 away from the tanh form
    "swiglu": nn.silu,  # of the gate, which then multiplies what "up" gives
    "relu2": lambda x: jnp.square(nn.relu(x)),  # "Primer: Searching for Efficient Transformers"
}


class KVCache(NamedTuple):
    """Keys [L, J, S, H] and values [L, J, H, S] of the positions read so far; without L inside a layer.

    Each lies as attention's products read it, so that none copies the cache for every token. What lies beyond those
    positions is unspecified: the causal mask hides it until it is overwritten.
    """

    keys: jax.Array
    values: jax.Array


class Linear(nn.Module):
    """x @ kernel + bias from the last `n_in` axes of x to `features`; with LoRA also x @ lora_a @ lora_b, scaled.

    Layers that write to the residual stream start smaller by sqrt(2 L), the number of them. lora_b starts at
    zero, so that training begins at the weights it has. Source: "LoRA", section 4.1.
    """

    config: ModelConfig
    features: tuple[int, ...]
    n_in: int = 1
    use_bias: bool = False
    residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        in_shape, n_out = x.shape[-self.n_in :], math.prod(self.features)
        n_in = math.prod(in_shape)
        std = INIT_STD * (2 * config.n_layer) ** -0.5 if self.residual else INIT_STD
        init = nn.initializers.normal(std)
        # As one product of two matrices: with [B, T, D] as it is, XLA on CPUs transposes the gradient of [B, T, F],
        # which took a quarter of a step.
        rows = x.reshape(-1, n_in).astype(dtype)
        kernel: Any = self.get_variable("params", "kernel")
        if isinstance(kernel, MATRICES):
            y = matrices.product(rows, kernel).astype(dtype)
        else:
            kernel = self.param("kernel", init, (*in_shape, *self.features))
            kernel = gathered(kernel.astype(dtype), "/".join((*self.path, "kernel")))
            y = multiply(rows, kernel.reshape(n_in, n_out))
        if config.lora_rank and self.name in config.lora_layers.split(","):
            rank = config.lora_rank
            a = self.param("lora_a", nn.initializers.normal(n_in**-0.5), (n_in, rank)).astype(dtype)
            b = self.param("lora_b", nn.initializers.zeros, (rank, *self.features)).astype(dtype)
            low = checkpoint_name(multiply(rows, a), PRODUCT)
            y += multiply(low, b.reshape(rank, n_out)) * (config.lora_alpha / rank)
        y = checkpoint_name(y, PRODUCT).reshape(*x.shape[: x.ndim - self.n_in], *self.features)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, self.features).astype(dtype)
        return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: KVCache | None, position_bT: jax.Array, document_BT: jax.Array | None
    ) -> tuple[jax.Array, KVCache | None]:
        config = self.config
        bias = config.bias or config.qkv_bias
        N, K, H = config.n_head, config.kv_heads, config.head_width
        if self.has_variable("params", "query_key_value"):  # laid out for sampling: one product is faster than three
            all_BTMH = Linear(config, (N + 2 * K, H), use_bias=bias, name="query_key_value")(x_BTD)
            q_BTNH, k_BTKH, v_BTKH = jnp.split(all_BTMH, [N, N + K], axis=2)
        else:
            q_BTNH = Linear(config, (N, H), use_bias=bias, name="query")(x_BTD)
            k_BTKH = Linear(config, (K, H), use_bias=bias, name="key")(x_BTD)
            v_BTKH = Linear(config, (K, H), use_bias=bias, name="value")(x_BTD)
        if config.qk_norm:  # without weights, as in modded-nanoGPT, and so the same before the rotation as after it
            q_BTNH, k_BTKH = _rms_norm(config, "query_norm")(q_BTNH), _rms_norm(config, "key_norm")(k_BTKH)
        if config.position == "rope":
            angle_bTH = rope_angles(config, position_bT)
            q_BTNH, k_BTKH = rotate(q_BTNH, angle_bTH), rotate(k_BTKH, angle_bTH)
        if cache is not None:
            T = x_BTD.shape[1]
            keys_JTH = jnp.moveaxis(k_BTKH, 1, 2).reshape(-1, T, H)
            values_JHT = jnp.moveaxis(v_BTKH, 1, 3).reshape(-1, H, T)
            cache = KVCache(
                _write(cache.keys, keys_JTH, position_bT[:, 0], axis=1),
                _write(cache.values, values_JHT, position_bT[:, 0], axis=2),
            )
            y_BTNH = cached_attention(q_BTNH, *cache, position_bT)
        elif config.attention in ("blockwise", "splash", "cudnn"):
            y_BTNH = sequence_attention(config.attention, q_BTNH, k_BTKH, v_BTKH, document_BT)
        else:
            y_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, Dropout(config.attention_rate), document_BT)
        out = Linear(config, (config.n_embd,), n_in=2, use_bias=config.bias, residual=True, name="out")
        return Dropout(config.dropout)(out(y_BTNH)), cache


class MLP(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config

        # In float32, rounded once: bfloat16 is rounded after every operation, which on a CPU was a sixteenth of a step.
        # Kept for the gradient is what goes in; of unrolled layers XLA may keep more.
        @partial(jax.checkpoint, prevent_cse=False)
        def activation(x: jax.Array) -> jax.Array:
            return ACTIVATIONS[config.activation](x.astype(jnp.float32)).astype(x.dtype)

        h_BTF = Linear(config, (config.mlp_features,), use_bias=config.bias, name="up")(x_BTD)
        if config.activation == "swiglu":
            gate_BTF = Linear(config, (config.mlp_features,), use_bias=config.bias, name="gate")(x_BTD)
            h_BTF = activation(gate_BTF) * h_BTF
        else:
            h_BTF = activation(h_BTF)
        down = Linear(config, (config.n_embd,), use_bias=config.bias, residual=True, name="down")
        return Dropout(config.dropout)(down(h_BTF))


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: KVCache | None, position_bT: jax.Array, document_BT: jax.Array | None
    ) -> tuple[jax.Array, KVCache | None]:
        y_BTD, cache = Attention(self.config, name="attention")(
            _norm(self.config, name="attention_norm")(x_BTD), cache, position_bT, document_BT
        )
        x_BTD = x_BTD + y_BTD
        x_BTD = x_BTD + MLP(self.config, name="mlp")(_norm(self.config, name="mlp_norm")(x_BTD))
        return constrain(x_BTD), cache


class GPT(nn.Module):
    """Token embeddings, pre-norm blocks, a norm and a head, in the variants that `ModelConfig` has.

    Parameters are float32 where they are trained; activations have `config.dtype`; softmax, norm statistics and
    logits are float32. Dropout is on exactly where `apply` is given a "dropout" rng. Parameters are stacked along a
    leading layer axis, so that the tree is the same however the layers run: unrolled they train faster on CPUs, as one
    loop they compile in a fraction of the time and decode faster (docs/performance.md).
    """

    config: ModelConfig

    def setup(self) -> None:
        config, init = self.config, nn.initializers.normal(INIT_STD)
        self.token_embedding = self._table("token_embedding", init)
        if config.position == "learned":
            self.position_embedding = self.param("position_embedding", init, (config.block_size, config.n_embd))
        if config.embedding_norm:
            self.embedding_norm = _rms_norm(config)
        self.embedding_dropout = Dropout(config.dropout)
        block = Block
        if config.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(PRODUCT) if config.remat == "dots" else None
            block = nn.remat(Block, policy=policy, prevent_cse=config.layers == "unrolled")
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=config.n_layer,
            unroll=config.n_layer if config.layers == "unrolled" else 1,
        )(config)
        self.final_norm = _norm(config)
        if not config.tied_head:
            self.head = self._table("head", init)

    def _table(self, name: str, init: Any) -> Any:
        value: Any = self.get_variable("params", name)
        shape = (self.config.padded_vocab_size, self.config.n_embd)
        return value if isinstance(value, Int8) else self.param(name, init, shape)

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the token that follows each place; those of padded ids are -inf."""
        return self.logits(self.hidden(tokens_BT)[0])

    def hidden(
        self, tokens_BT: Int[Array, "B T"], cache: Any = None, offset_B: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The normalized residual stream after the last block; a row's tokens stand from its offset on, or from 0.

        A cache holds what was read at positions before the offsets; the new one holds these tokens too.
        Documents are kept apart where there is none: a separator is the first token of the document behind it.
        """
        x_BTD, position_bT, document_BT = self.embed(tokens_BT, offset_B, packed=cache is None)
        x_BTD, cache = self.layers(x_BTD, cache, position_bT, document_BT)
        return self.normalize(x_BTD), cache

    def embed(
        self, tokens_BT: Int[Array, "B T"], offset_B: Int[Array, " B"] | None = None, packed: bool = True
    ) -> tuple[Float[Array, "B T D"], Int[Array, "b T"], Int[Array, "B T"] | None]:
        """What the first block takes: the tokens' vectors, their positions, and the numbers of their documents.

        Documents are numbered where rows are `packed` with several of them, and the model has a separator.
        """
        position_bT = jnp.arange(tokens_BT.shape[1])[None]
        if offset_B is not None:
            position_bT = position_bT + offset_B[:, None]
        document_BT = None
        if self.config.separator is not None and packed:
            document_BT = jnp.cumsum(tokens_BT == self.config.separator, axis=1)
        if isinstance(self.token_embedding, Int8):
            x_BTD = matrices.rows(self.token_embedding, tokens_BT)
        else:
            x_BTD = jnp.take(gathered(self.token_embedding, "token_embedding"), tokens_BT, axis=0)
        if self.config.position == "learned" and offset_B is None:
            x_BTD = x_BTD + self.position_embedding[None, : tokens_BT.shape[1]]
        elif self.config.position == "learned":
            x_BTD = x_BTD + jnp.take(self.position_embedding, position_bT, axis=0, mode="clip")
        if self.config.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        x_BTD = constrain(self.embedding_dropout(x_BTD.astype(self.config.dtype)))
        return x_BTD, position_bT, document_BT

    def normalize(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The norm behind the last block."""
        return self.final_norm(x_BTD)

    @nn.nowrap
    def head_of(self, params: Any) -> Float[Array, "V D"]:
        """The output head among the parameters, as the product with the residual stream wants it."""
        head_VD = params["token_embedding" if self.config.tied_head else "head"]
        return gathered(head_VD.astype(self.config.dtype), "head")

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits over the padded vocabulary: -inf at padded ids, which so are neither sampled nor scored.

        With a cap no other is larger: cap tanh(x / cap) ("Gemma 2", section 2).
        """
        tree = {"token_embedding": self.token_embedding} if self.config.tied_head else {"head": self.head}
        [table] = tree.values()
        if isinstance(table, Int8):
            logits_BTV = matrices.product(x_BTD, table)
        else:
            head_VD = self.head_of(tree)
            logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, head_VD, preferred_element_type=jnp.float32)
        logits_BTV = constrain(logits_BTV, None, "tensor")
        if cap := self.config.logit_cap:
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
        if self.config.padded_vocab_size == self.config.vocab_size:
            return logits_BTV
        real_V = jnp.arange(self.config.padded_vocab_size) < self.config.vocab_size
        return jnp.where(real_V[None, None], logits_BTV, -jnp.inf)


def rope_angles(config: ModelConfig, position_bT: Int[Array, "b T"]) -> Float[Array, "b T H"]:
    """By how many radians each pair of features turns at each position; H is half a head's width here.

    Llama 3 turns the pairs slower whose wavelength is long beside the context it was first trained on: by 1 /
    rope_factor, and in between by a blend. Sources: "RoFormer", section 3.2.2; Llama 3.1's reference code.
    """
    frequency_H = config.rope_theta ** -(np.arange(0, config.head_width, 2) / config.head_width)
    turns_H = config.rope_original_block_size * frequency_H / (2 * np.pi)
    kept_H = np.clip((turns_H - ROPE_LOW) / (ROPE_HIGH - ROPE_LOW), 0, 1)
    frequency_H = frequency_H * (kept_H + (1 - kept_H) / config.rope_factor)
    return position_bT[:, :, None].astype(jnp.float32) * jnp.asarray(frequency_H, jnp.float32)[None, None]


def rotate(x_BTNH: Float[Array, "B T N H"], angle_bTH: Float[Array, "b T _"]) -> Float[Array, "B T N H"]:
    """Turn each head's pairs of features (i, i + H / 2), the layout of Hugging Face's Llama, by their angles."""
    cos_bT1H, sin_bT1H = jnp.cos(angle_bTH)[:, :, None], jnp.sin(angle_bTH)[:, :, None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos_bT1H - second * sin_bT1H, second * cos_bT1H + first * sin_bT1H]
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


def _write(cache: Any, new: jax.Array, offset_b: jax.Array, axis: int) -> jax.Array:
    """The cache with new keys or values from each row's offset on, along the axis of positions.

    Its first axis is of rows, or of rows and, in each, key heads.
    """
    if len(offset_b) == 1:  # all rows at once: one copy, no scatter
        return jax.lax.dynamic_update_slice_in_dim(cache, new, offset_b[0], axis)
    offset_J = jnp.repeat(offset_b, len(cache) // len(offset_b))
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis - 1))(
        cache, new, offset_J
    )


def _norm(config: ModelConfig, name: str | None = None) -> nn.Module:
    """LayerNorm or RMSNorm; Flax's own epsilon is 1e-6, GPT-2's 1e-5."""
    if config.norm == "nonparametric_rmsnorm":
        return _rms_norm(config, name)
    if config.norm == "rmsnorm":
        return nn.RMSNorm(epsilon=config.norm_eps, dtype=config.dtype, name=name)
    return nn.LayerNorm(epsilon=config.norm_eps, use_bias=config.bias, dtype=config.dtype, name=name)


def _rms_norm(config: ModelConfig, name: str | None = None) -> nn.Module:
    """x / RMS(x), without weights."""
    return nn.RMSNorm(epsilon=config.norm_eps, use_scale=False, dtype=config.dtype, name=name)


class Dropout(nn.Module):
    """Dropout of 1 to 255 places in 256, whichever is nearest to the rate, on exactly where a "dropout" rng is given.

    A random word of 32 bits decides on four places: on a CPU a word for each takes seven times as long.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.rate or not self.has_rng("dropout"):
            return x
        n, kept = x.shape[-1], min(max(round(256 * (1 - self.rate)), 1), 255)
        words = jax.random.bits(self.make_rng("dropout"), (*x.shape[:-1], -(-n // 4)), jnp.uint32)
        keep = jnp.concatenate([(words >> shift).astype(jnp.uint8) < kept for shift in (0, 8, 16, 24)], axis=-1)
        return jnp.where(keep[..., :n], x / (kept / 256), 0)
