"""The decoder in Flax linen: GPT-2, Llama and the families like it as fields of one config.

Local arrays carry their shape in their name, one letter an axis:
    B batch (b: B, or 1 where rows are alike)    T query length    S key length    D model width    L layers
    N query heads    K key/value heads    H head width    F MLP width    V vocabulary (padded)
    J = B K, the rows of a KV cache    Q = T N / K, the queries that share one key head
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from gptjax.attention import cached_attention, causal_attention, sequence_attention
from gptjax.config import ModelConfig
from gptjax.matmul import linear, linear_transposed, lookup, matmul, prepared
from gptjax.sharding import constrain, platform_in_use

INIT_STD = 0.02  # as in GPT-2's code; layers that write to the residual stream start smaller (its paper, section 2.3)
ROPE_LOW, ROPE_HIGH = 1.0, 4.0  # Llama 3: turns within the original context, between which the scaling is blended
MATMUL = "matmul"  # names the activations that remat "dots" keeps for the backward pass
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu_erf": lambda x: nn.gelu(x, approximate=False),
    "swiglu": nn.silu,  # of the gate, which then multiplies the output of "up"
    "relu2": lambda x: jnp.square(nn.relu(x)),  # "Primer: Searching for Efficient Transformers"
}


class KVCache(NamedTuple):
    """Keys [L, J, S, H] and values [L, J, H, S] of the positions read so far; without L for one layer.

    Both layouts are those that attention's matmuls read without a copy. Positions not yet written hold anything: the
    causal mask hides them.
    """

    keys: jax.Array
    values: jax.Array


class Linear(nn.Module):
    """x @ kernel + bias over the last `n_in` axes of x, giving axes `features`; with LoRA plus x @ lora_a @ lora_b.

    `residual` marks the 2 L layers that write to the residual stream: they start smaller by 1 / sqrt(2 L). LoRA's term
    is scaled by lora_alpha / lora_rank and starts at zero ("LoRA", section 4.1).
    """

    config: ModelConfig
    features: tuple[int, ...]
    n_in: int = 1
    use_bias: bool = False
    residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype, inputs = self.config, self.config.dtype, x.shape[-self.n_in :]
        std = INIT_STD * (2 * config.n_layer) ** -0.5 if self.residual else INIT_STD
        kernel = parameter(self, "kernel", nn.initializers.normal(std), (*inputs, *self.features))
        # One matmul of two matrices, for example [B T, N H] by [N H, D] in the attention's output projection: the
        # gradient of a batched form is transposed by XLA on CPUs.
        rows = x.reshape(-1, math.prod(inputs)).astype(dtype)
        y = linear(rows, prepared(kernel, "/".join((*self.path, "kernel")), dtype))
        if config.lora_rank and self.name in config.lora_layers.split(","):
            y += self._low_rank(rows)
        y = checkpoint_name(y, MATMUL)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, self.features).astype(dtype).reshape(1, -1)
        return y.reshape(*x.shape[: x.ndim - self.n_in], *self.features)

    def _low_rank(self, rows: jax.Array) -> jax.Array:
        config, n_in = self.config, rows.shape[1]
        a = self.param("lora_a", nn.initializers.normal(n_in**-0.5), (n_in, config.lora_rank))
        b = self.param("lora_b", nn.initializers.zeros, (config.lora_rank, *self.features))
        low = checkpoint_name(matmul(rows, a.astype(rows.dtype)), MATMUL)
        b = b.astype(rows.dtype).reshape(config.lora_rank, -1)
        return matmul(low, b) * (config.lora_alpha / config.lora_rank)


class Attention(nn.Module):
    """Causal self-attention, of T tokens among themselves or, with a cache, also over the positions before them.

    N query heads share K key and value heads in groups of N / K ("GQA", section 2.2). `fused_qkv`: one kernel
    "query_key_value" computes all three, which sampling lays out for speed.
    """

    config: ModelConfig
    fused_qkv: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        cache: KVCache | None,
        rotates: jax.Array | None,
        position_bT: jax.Array,
        document_BT: jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None]:
        config = self.config
        q_BTNH, k_BTKH, v_BTKH = self._queries_keys_values(x_BTD)
        if config.qk_norm:
            q_norm, k_norm = [rms_norm(config, name, config.qk_norm_scale) for name in ("query_norm", "key_norm")]
            q_BTNH, k_BTKH = q_norm(q_BTNH), k_norm(k_BTKH)
        if config.position == "rope":
            angle_bTH = rope_angles(config, position_bT)
            if rotates is not None:
                angle_bTH = angle_bTH * rotates
            q_BTNH, k_BTKH = rotate(q_BTNH, angle_bTH), rotate(k_BTKH, angle_bTH)
        if cache is not None:
            cache = write_cache(cache, k_BTKH, v_BTKH, position_bT[:, 0])
            y_BTNH = cached_attention(q_BTNH, *cache, position_bT, config.local_window)
        elif config.attention in ("blockwise", "splash", "cudnn"):
            y_BTNH = sequence_attention(config.attention, q_BTNH, k_BTKH, v_BTKH, document_BT, config.local_window)
        else:
            drop = Dropout(config.attention_rate)
            y_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, drop, document_BT, config.local_window)
        biased = config.bias or config.out_bias
        out = Linear(config, (config.n_embd,), n_in=2, use_bias=biased, residual=True, name="out")
        return Dropout(config.dropout)(out(y_BTNH)), cache

    def _queries_keys_values(self, x_BTD: jax.Array) -> list[jax.Array]:
        config = self.config
        N, K, H = config.n_head, config.kv_heads, config.head_width
        make = partial(Linear, config, use_bias=config.bias or config.qkv_bias)
        if self.fused_qkv:
            return jnp.split(make((N + 2 * K, H), name="query_key_value")(x_BTD), [N, N + K], axis=2)
        return [make((n, H), name=name)(x_BTD) for name, n in (("query", N), ("key", K), ("value", K))]


class MLP(nn.Module):
    """down(activation(up(x))), or down(silu(gate(x)) * up(x)) for SwiGLU ("GLU Variants Improve Transformer")."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config

        # In float32 and rounded once: in bfloat16 XLA rounds after every operation. Recomputed in the backward pass,
        # which keeps its input alone; elsewhere than on a CPU XLA would keep the float32 tanh if it could.
        @partial(jax.checkpoint, prevent_cse=platform_in_use() != "cpu")
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
    """A pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig
    fused_qkv: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        cache: KVCache | None,
        rotates: jax.Array | None,
        position_bT: jax.Array,
        document_BT: jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None]:
        y_BTD, cache = Attention(self.config, self.fused_qkv, name="attention")(
            norm(self.config, name="attention_norm")(x_BTD), cache, rotates, position_bT, document_BT
        )
        x_BTD = x_BTD + y_BTD
        x_BTD = x_BTD + MLP(self.config, name="mlp")(norm(self.config, name="mlp_norm")(x_BTD))
        return constrain(x_BTD), cache


class GPT(nn.Module):
    """Token embeddings, L blocks, a norm and an output head.

    Parameters are float32 in training; activations have `config.dtype`; softmax, norm statistics and logits are
    float32. Dropout is on exactly where `apply` is given a "dropout" rng. The blocks' parameters are stacked along a
    leading layer axis, so the tree is the same whether the layers run unrolled or in a loop.
    """

    config: ModelConfig

    def setup(self) -> None:
        """Make the parameters and layers, as Flax asks a module to."""
        config, init = self.config, nn.initializers.normal(INIT_STD)
        self.token_embedding = parameter(self, "token_embedding", init, (config.padded_vocab_size, config.n_embd))
        if config.position == "learned":
            self.position_embedding = self.param("position_embedding", init, (config.block_size, config.n_embd))
        if config.embedding_norm:
            self.embedding_norm = rms_norm(config)
        self.embedding_dropout = Dropout(config.dropout)
        block = Block
        if config.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(MATMUL) if config.remat == "dots" else None
            block = nn.remat(Block, policy=policy, prevent_cse=config.layers == "unrolled")
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=config.n_layer,
            unroll=config.n_layer if config.layers == "unrolled" else 1,
        )(config)
        self.final_norm = norm(config)
        if not config.tied_head:
            self.head = parameter(self, "head", init, (config.padded_vocab_size, config.n_embd))

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the token after each position; -inf for the padding of the vocabulary."""
        return self.logits(self.hidden(tokens_BT)[0])

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        cache: Any = None,
        offset_B: Int[Array, " B"] | None = None,
        first_BT: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The normalized residual stream after the last block, and the cache with these tokens added.

        A row's tokens are at positions from its offset on, by default from 0. Without a cache documents are kept apart:
        a separator token begins a document, or `first_BT` says where one begins, and there positions begin at 0 again.
        """
        x_BTD, position_bT, document_BT = self.embed(tokens_BT, offset_B, cache is None, first_BT)
        x_BTD, cache = self.layers(x_BTD, cache, rotary_layers(self.config), position_bT, document_BT)
        return self.normalize(x_BTD), cache

    def embed(
        self,
        tokens_BT: Int[Array, "B T"],
        offset_B: Int[Array, " B"] | None = None,
        packed: bool = True,
        first_BT: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Int[Array, "b T"], Int[Array, "B T"] | None]:
        """The first block's inputs: embeddings, positions and, where rows are `packed` documents, document numbers."""
        config, document_BT = self.config, None
        position_bT = jnp.arange(tokens_BT.shape[1])[None]
        if offset_B is not None:
            position_bT = position_bT + offset_B[:, None]
        if config.separator is not None and packed:
            document_BT = jnp.cumsum(tokens_BT == config.separator, axis=1)
        if first_BT is not None:
            document_BT = jnp.cumsum(first_BT, axis=1)
            position_bT = position_bT - jax.lax.cummax(jnp.where(first_BT, position_bT, 0), axis=1)
        x_BTD = lookup(prepared(self.token_embedding, "token_embedding"), tokens_BT)
        if config.position == "learned" and offset_B is None and first_BT is None:
            x_BTD = x_BTD + self.position_embedding[None, : tokens_BT.shape[1]]
        elif config.position == "learned":
            x_BTD = x_BTD + jnp.take(self.position_embedding, position_bT, axis=0, mode="clip")
        if config.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        return constrain(self.embedding_dropout(x_BTD.astype(config.dtype))), position_bT, document_BT

    def normalize(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The norm after the last block."""
        return self.final_norm(x_BTD)

    @nn.nowrap
    def head_of(self, params: Any) -> Any:
        """The output head [V, D] among the parameters, ready for a matmul with the residual stream."""
        return prepared(params["token_embedding" if self.config.tied_head else "head"], "head", self.config.dtype)

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits over the padded vocabulary, -inf at padded ids, which are neither sampled nor scored.

        With a cap they are cap tanh(x / cap) ("Gemma 2", section 2).
        """
        config = self.config
        head = self.head_of({"token_embedding": self.token_embedding} if config.tied_head else {"head": self.head})
        logits_BTV = constrain(linear_transposed(x_BTD, head), None, "tensor")
        if cap := config.logit_cap:
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
        if config.padded_vocab_size == config.vocab_size:
            return logits_BTV
        real_V = jnp.arange(config.padded_vocab_size) < config.vocab_size
        return jnp.where(real_V[None, None], logits_BTV, -jnp.inf)


def init_params(config: ModelConfig, seed: int) -> Any:
    """The parameters before the first step, in float32; the way to compute attention and layers changes none."""
    model = GPT(replace(config, dtype="float32", attention="plain", layers="looped"))  # which compile fastest
    return model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]


@cache
def param_shapes(config: ModelConfig) -> Any:
    """The tree of `init_params` as `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(lambda: init_params(config, 0))


def parameter(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
    """A module's parameter in the form in which it is stored, or drawn by `init` where there is none yet."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


def n_input_axes(name: str) -> int:
    """How many leading axes of the kernel of this path are inputs of its matmul: heads and their width for "out"."""
    return 2 if name.endswith("/out/kernel") else 1


def rotary_layers(config: ModelConfig) -> Float[Array, " L"] | None:
    """1 for each layer that has rotary positions and 0 for each that has none (NoPE); None where all have them.

    Source: "RoPE to NoPE and Back Again" (Yang et al., 2025).
    """
    if not config.nope_interval:
        return None
    return jnp.asarray(np.arange(1, config.n_layer + 1) % config.nope_interval != 0, jnp.float32)


def rope_angles(config: ModelConfig, position_bT: Int[Array, "b T"]) -> Float[Array, "b T _"]:
    """The angle in radians by which each of a head's H / 2 pairs of features is rotated at each position.

    Pair i turns by theta^(-2 i / H) a position. With rope_factor > 1, pairs that turn less than ROPE_LOW times within
    the original context turn slower by that factor, those above ROPE_HIGH keep their speed, and the rest blend both.
    Sources: "RoFormer", section 3.2.2; Llama 3.1's reference code.
    """
    frequency_H = config.rope_theta ** -(np.arange(0, config.head_width, 2) / config.head_width)
    turns_H = config.rope_original_block_size * frequency_H / (2 * np.pi)
    kept_H = np.clip((turns_H - ROPE_LOW) / (ROPE_HIGH - ROPE_LOW), 0, 1)
    frequency_H = frequency_H * (kept_H + (1 - kept_H) / config.rope_factor)
    return position_bT[:, :, None].astype(jnp.float32) * jnp.asarray(frequency_H, jnp.float32)[None, None]


def rotate(x_BTNH: Float[Array, "B T N H"], angle_bTH: Float[Array, "b T _"]) -> Float[Array, "B T N H"]:
    """Rotate each head's pairs of features (i, i + H / 2), the layout of Hugging Face's Llama, by their angles."""
    cos_bT1H, sin_bT1H = jnp.cos(angle_bTH)[:, :, None], jnp.sin(angle_bTH)[:, :, None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos_bT1H - second * sin_bT1H, second * cos_bT1H + first * sin_bT1H]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


def write_cache(cache: KVCache, k_BTKH: jax.Array, v_BTKH: jax.Array, offset_b: Int[Array, " b"]) -> KVCache:
    """One layer's cache with these keys and values written at positions from each row's offset on."""
    T, H = k_BTKH.shape[1], k_BTKH.shape[3]
    keys_JTH = jnp.moveaxis(k_BTKH, 1, 2).reshape(-1, T, H)
    values_JHT = jnp.moveaxis(v_BTKH, 1, 3).reshape(-1, H, T)
    update = jax.lax.dynamic_update_slice_in_dim
    if len(offset_b) == 1:  # one copy for all rows, no scatter
        return KVCache(update(cache.keys, keys_JTH, offset_b[0], 1), update(cache.values, values_JHT, offset_b[0], 2))
    offset_J = jnp.repeat(offset_b, len(cache.keys) // len(offset_b))
    return KVCache(
        jax.vmap(partial(update, axis=0))(cache.keys, keys_JTH, offset_J),
        jax.vmap(partial(update, axis=1))(cache.values, values_JHT, offset_J),
    )


def norm(config: ModelConfig, name: str | None = None) -> nn.Module:
    """The config's LayerNorm or RMSNorm, with its epsilon (Flax's default is 1e-6, GPT-2's 1e-5)."""
    if config.norm == "nonparametric_rmsnorm":
        return rms_norm(config, name)
    if config.norm == "rmsnorm":
        return rms_norm(config, name, use_scale=True)
    return nn.LayerNorm(epsilon=config.norm_eps, use_bias=config.bias, dtype=config.dtype, name=name)


def rms_norm(config: ModelConfig, name: str | None = None, use_scale: bool = False) -> nn.Module:
    """x / RMS(x), by default without weights."""
    return nn.RMSNorm(epsilon=config.norm_eps, use_scale=use_scale, dtype=config.dtype, name=name)


class Dropout(nn.Module):
    """Dropout where a "dropout" rng is given; the probability of keeping an entry is rounded to n / 256, 1 <= n <= 255.

    Each random word of 32 bits gives four bytes, and an entry is kept if its byte is below n: at rate 0.2 n is 205.
    Drawing a word for every entry takes a CPU seven times as long.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.rate or not self.has_rng("dropout"):
            return x
        width, n_kept = x.shape[-1], min(max(round(256 * (1 - self.rate)), 1), 255)
        words = jax.random.bits(self.make_rng("dropout"), (*x.shape[:-1], -(-width // 4)), jnp.uint32)
        bytes_ = jnp.concatenate([(words >> shift).astype(jnp.uint8) for shift in (0, 8, 16, 24)], axis=-1)
        return jnp.where(bytes_[..., :width] < n_kept, x / (n_kept / 256), 0)
