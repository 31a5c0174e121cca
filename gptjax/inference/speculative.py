"""Speculative decoding: a small draft model proposes tokens, and the large model checks them all in one pass.

The tokens have exactly the large model's distribution, whatever the draft proposes; a better draft is only faster.
Sources: "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023), algorithm 1;
"Accelerating Large Language Model Decoding with Speculative Sampling" (Chen et al., 2023), algorithm 2.
Shape suffixes as in model.py; K is the number of proposals, k is K + 1. There is one row.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax.config import ModelConfig
from gptjax.inference.decoder import Cache, hidden, init_cache, logits
from gptjax.inference.generate import Chunk, read
from gptjax.inference.sampling import Sampling, TokenIds, apply_rules, log_probs_of, mark_seen, seen_tokens

PROPOSALS = 4  # in a round


def speculate(
    config: ModelConfig,
    params: Any,
    draft_config: ModelConfig,
    draft_params: Any,
    prompt: TokenIds,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[Chunk]:
    """Yield the tokens that follow a prompt, a few at a time, with the distribution that `generate` draws from.

    Both models must have the same tokens.
    """
    models, block_size = [(config, params), (draft_config, draft_params)], config.block_size
    key, caches, n_drawn = jax.random.key(np.uint32(seed)), None, 0
    seen_1V = seen_tokens(sampling, [prompt], config.vocab_size)
    text = np.asarray(prompt, np.int32)[-block_size:]
    while n_drawn < max_new_tokens:
        if caches is None:
            empty = [init_cache(*model, 1, block_size + PROPOSALS + 1) for model in models]
            caches = tuple(read(*model, cache, [text[:-1]])[0] for model, cache in zip(models, empty, strict=True))
        last_1, position_1 = jnp.asarray(text[-1:]), jnp.array([len(text) - 1], jnp.int32)
        caches, tokens_k, log_probs_k, n_new = speculate_once(
            *zip(*models, strict=True), caches, last_1, position_1, seen_1V, jax.random.fold_in(key, n_drawn), sampling
        )
        n_kept = min(int(n_new), block_size + 1 - len(text), max_new_tokens - n_drawn)
        new = np.asarray(tokens_k)[:n_kept]
        text, n_drawn = np.append(text, new), n_drawn + n_kept
        seen_1V = None if seen_1V is None else seen_1V.at[0, new].set(True)
        yield Chunk(new[None], np.asarray(log_probs_k)[None, :n_kept])
        if len(text) > block_size:  # as in `generate`: the last half is read again
            text, caches = text[-max(block_size // 2, 1) :], None


@partial(jax.jit, static_argnames="configs", donate_argnames="caches")
def speculate_once(
    configs: tuple[ModelConfig, ModelConfig],
    params: tuple[Any, Any],
    caches: tuple[Cache, Cache],
    last_1: Int[Array, "1"],
    position_1: Int[Array, "1"],
    seen_1V: Bool[Array, "1 V"] | None,
    key: Key[Array, ""],
    sampling: Sampling,
) -> Any:
    """One round: the draft proposes K tokens, some of them are accepted, and one more is drawn.

    `last_1` is the text's last token, which neither cache holds yet, and `position_1` its position.
    Returns both caches, the tokens [K + 1], their log-probabilities, and how many of them are valid.
    """
    vocab_size = configs[0].vocab_size
    keys_3 = jax.random.split(key, 3)

    def propose(carry: Any, i: jax.Array) -> Any:
        token_1, cache, seen_1V = carry
        logits_1V, cache = _next_logits(configs[1], params[1], token_1, cache, position_1 + i, vocab_size)
        probs_1V = _probabilities(logits_1V, seen_1V, sampling)
        token_1 = jax.random.categorical(jax.random.fold_in(keys_3[0], i), jnp.log(probs_1V)).astype(jnp.int32)
        return (token_1, cache, mark_seen(seen_1V, token_1)), (token_1[0], probs_1V[0], seen_1V)

    # The last of the K + 1 steps only writes proposal K to the draft's cache.
    (_, draft_cache, _), (drawn_k, draft_kV, seen_k1V) = jax.lax.scan(
        propose, (last_1, caches[1], seen_1V), jnp.arange(PROPOSALS + 1)
    )
    read_k = jnp.append(last_1, drawn_k[:-1])
    logits_kV, cache = _next_logits(configs[0], params[0], read_k, caches[0], position_1, vocab_size)
    probs_kV = _probabilities(logits_kV, None if seen_k1V is None else seen_k1V[:, 0], sampling)
    tokens_k, n_new = accept(probs_kV, draft_kV[:-1], drawn_k[:-1], keys_3[1:])
    return (cache, draft_cache), tokens_k, log_probs_of(logits_kV, tokens_k), n_new


def accept(
    probs_kV: Float[Array, "k V"], draft_KV: Float[Array, "K V"], proposed_K: Int[Array, " K"], keys_2: Key[Array, "2"]
) -> tuple[Int[Array, " k"], Int[Array, ""]]:
    """Accept each proposal with probability p / q up to the first rejection, then draw one token from max(p - q, 0).

    p is the model's distribution at that place and q the draft's; after K accepted proposals q is 0.
    Returns the tokens and how many of them are valid.
    """
    n = len(proposed_K)
    p_K, q_K = [probs[jnp.arange(n), proposed_K] for probs in (probs_kV[:-1], draft_KV)]
    accepted_K = jax.random.uniform(keys_2[0], (n,)) * q_K < p_K
    n_accepted = jnp.sum(jnp.cumprod(accepted_K))
    p_V, q_V = probs_kV[n_accepted], jnp.pad(draft_KV, ((0, 1), (0, 0)))[n_accepted]
    rest_V = jnp.maximum(p_V - q_V, 0.0)
    rest_V = jnp.where(jnp.sum(rest_V) > 0, rest_V, p_V)  # p and q can be equal up to rounding
    last = jax.random.categorical(keys_2[1], jnp.log(rest_V)).astype(jnp.int32)
    return jnp.append(proposed_K, last).at[n_accepted].set(last), n_accepted + 1


def _next_logits(
    config: ModelConfig, params: Any, tokens_T: jax.Array, cache: Cache, position_1: jax.Array, vocab_size: int
) -> tuple[jax.Array, Cache]:
    """The logits after each token, for exactly `vocab_size` ids: those that the model lacks are -inf."""
    x_1TD, cache = hidden(config, params, tokens_T[None], cache, position_1)
    logits_TV = logits(config, params, x_1TD)[0, :, :vocab_size]
    missing = vocab_size - logits_TV.shape[1]
    return jnp.pad(logits_TV, ((0, 0), (0, missing)), constant_values=-jnp.inf), cache


def _probabilities(logits_TV: jax.Array, seen_TV: jax.Array | None, sampling: Sampling) -> jax.Array:
    """The distribution that a token is drawn from; at temperature 0 all of it is on the likeliest."""
    logits_TV = apply_rules(logits_TV, seen_TV, sampling)
    likeliest_TV = jax.nn.one_hot(jnp.argmax(logits_TV, axis=-1), logits_TV.shape[1])
    return jnp.where(sampling.temperature > 0, jax.nn.softmax(logits_TV), likeliest_TV)
