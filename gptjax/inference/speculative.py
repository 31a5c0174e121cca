"""Speculative decoding: a small model proposes tokens, the large one checks them all in one pass.

What is drawn has exactly the large model's distribution, whatever the small one proposes; the better it guesses, the
faster. Sources: "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023), algorithm 1;
"Accelerating Large Language Model Decoding with Speculative Sampling" (Chen et al., 2023), algorithm 2.
Shape suffixes as in model.py; K is the number of proposals, and rows are one.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax.config import ModelConfig
from gptjax.inference.decoder import Cache, hidden, init_cache, logits
from gptjax.inference.generate import Chunk, Ids, Sampling, apply_rules, prefill, see, seen

PROPOSALS = 4  # in a round


class Decoder(NamedTuple):
    """A model to draw from."""

    config: ModelConfig
    params: Any


def speculate(
    model: Decoder,
    draft: Decoder,
    prompt: Ids,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    proposals: int = PROPOSALS,
) -> Iterator[Chunk]:
    """The tokens that follow a prompt, a few at a time, distributed as those of `generate`.

    The two models have the same tokens.
    """
    block_size, temperature = model.config.block_size, jnp.float32(sampling.temperature)
    rules, key, n_new = replace(sampling, temperature=1.0), jax.random.key(np.uint32(seed)), 0
    text = np.asarray(prompt, np.int32)[-block_size:]
    seen_V = seen([prompt], model.config.padded_vocab_size)[0] if rules.repetition_penalty != 1 else None
    while n_new < max_new_tokens:
        caches = [_read(decoder, text[:-1], block_size + proposals + 1) for decoder in (model, draft)]
        while len(text) <= block_size and n_new < max_new_tokens:
            last, position = jnp.asarray(text[-1:]), jnp.int32(len(text) - 1)
            *caches, tokens, log_probs, n_drawn = _round(
                (model.config, draft.config),
                (model.params, draft.params),
                tuple(caches),
                last,
                position,
                seen_V,
                jax.random.fold_in(key, n_new),
                temperature,
                rules,
                proposals,
            )
            n_kept = min(int(n_drawn), block_size + 1 - len(text), max_new_tokens - n_new)
            new = np.asarray(tokens)[:n_kept]
            text, n_new = np.append(text, new), n_new + n_kept
            seen_V = None if seen_V is None else seen_V.at[new].set(True)
            yield Chunk(new[None], np.asarray(log_probs)[None, :n_kept])
        text = text[-max(block_size // 2, 1) :]


def _read(decoder: Decoder, tokens: Ids, size: int) -> Cache:
    """A cache of `size` places with these tokens in it."""
    cache = init_cache(decoder.config, decoder.params, 1, size)
    padded = np.zeros((1, min(max(32, 1 << max(len(tokens) - 1, 0).bit_length()), size)), np.int32)
    padded[0, : len(tokens)] = tokens
    start, length = jnp.zeros(1, jnp.int32), jnp.full(1, max(len(tokens), 1), jnp.int32)
    return prefill(decoder.config, decoder.params, cache, jnp.asarray(padded), start, length)[0]


@partial(jax.jit, static_argnames=("configs", "rules", "proposals"), donate_argnames="caches")
def _round(
    configs: tuple[ModelConfig, ModelConfig],
    params: tuple[Any, Any],
    caches: tuple[Cache, Cache],
    last_1: Int[Array, "1"],
    position: Int[Array, ""],
    seen_V: Bool[Array, " V"] | None,
    key: Key[Array, ""],
    temperature: Float[Array, ""],
    rules: Sampling,
    proposals: int,
) -> Any:
    """Propose, check, and draw one token more: both caches, the tokens [K + 1], log-probabilities, how many are drawn.

    The text's last token, which no cache has yet, stands at `position`.
    """
    (model, draft), (params, draft_params), (cache, draft_cache) = configs, params, caches
    propose_key, accept_key, extra_key = jax.random.split(key, 3)

    def propose(carry: Any, i: jax.Array) -> Any:
        token_1, draft_cache, seen_1V = carry
        x_11D, draft_cache = hidden(draft, draft_params, token_1[None], draft_cache, (position + i)[None])
        logits_1V = logits(draft, draft_params, x_11D)[0]
        known_1V = jnp.arange(logits_1V.shape[1])[None] < model.vocab_size
        logits_1V = jnp.where(known_1V, logits_1V, -jnp.inf)
        probs_1V = _probabilities(logits_1V, _of_width(seen_1V, logits_1V.shape[1]), temperature, rules)
        drawn_1 = jax.random.categorical(jax.random.fold_in(propose_key, i), jnp.log(probs_1V)).astype(jnp.int32)
        return (drawn_1, draft_cache, see(seen_1V, drawn_1)), (drawn_1[0], probs_1V[0])

    # One more than is proposed, so that the draft's cache has the last proposal too.
    seen_1V = None if seen_V is None else seen_V[None]
    (_, draft_cache, _), (drawn_k, guess_kV) = jax.lax.scan(
        propose, (last_1, draft_cache, seen_1V), jnp.arange(proposals + 1)
    )
    proposed_K, guess_KV = drawn_k[:-1], guess_kV[:-1]
    x_1kD, cache = hidden(model, params, jnp.concatenate([last_1, proposed_K])[None], cache, position[None])
    logits_kV = logits(model, params, x_1kD)[0]
    if seen_1V is not None:  # at each place the proposals before it too
        later_KV = jnp.cumsum(jax.nn.one_hot(proposed_K, seen_1V.shape[1], dtype=jnp.int32), axis=0) > 0
        seen_1V = jnp.concatenate([seen_1V, seen_1V | later_KV])
    n_ids = max(logits_kV.shape[1], guess_KV.shape[1])  # vocabularies may be padded to other sizes
    probs_kV = _of_width(_probabilities(logits_kV, seen_1V, temperature, rules), n_ids)
    guess_kV = _of_width(jnp.pad(guess_KV, ((0, 1), (0, 0))), n_ids)  # none is proposed after the last

    own_K, guessed_K = [jnp.take_along_axis(p[:-1], proposed_K[:, None], axis=1)[:, 0] for p in (probs_kV, guess_kV)]
    accepted_K = jax.random.uniform(accept_key, (proposals,)) * guessed_K < own_K
    n_accepted = jnp.sum(jnp.cumprod(accepted_K))
    rest_V = jnp.maximum(probs_kV[n_accepted] - guess_kV[n_accepted], 0.0)
    rest_V = jnp.where(jnp.sum(rest_V) > 0, rest_V, probs_kV[n_accepted])  # equal but for rounding
    extra = jax.random.categorical(extra_key, jnp.log(rest_V)).astype(jnp.int32)
    tokens_k = jnp.append(proposed_K, 0).at[n_accepted].set(extra)
    log_probs_kV = _of_width(jax.nn.log_softmax(logits_kV), n_ids)
    log_probs_k = jnp.take_along_axis(log_probs_kV, tokens_k[:, None], axis=1)[:, 0]
    return cache, draft_cache, tokens_k, log_probs_k, n_accepted + 1


def _probabilities(logits_TV: jax.Array, seen_TV: Any, temperature: jax.Array, rules: Sampling) -> jax.Array:
    """That tokens are drawn with; all on the likeliest at temperature 0."""
    logits_TV = apply_rules(logits_TV, seen_TV, temperature, rules)
    likeliest_TV = jax.nn.one_hot(jnp.argmax(logits_TV, axis=-1), logits_TV.shape[1])
    return jnp.where(temperature > 0, jax.nn.softmax(logits_TV), likeliest_TV)


def _of_width(x_TV: Any, n_ids: int) -> Any:
    """With so many ids: the further ones, which are padding, left out or nothing."""
    if x_TV is None or x_TV.shape[1] >= n_ids:
        return None if x_TV is None else x_TV[:, :n_ids]
    return jnp.pad(x_TV, ((0, 0), (0, n_ids - x_TV.shape[1])))
