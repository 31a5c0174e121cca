"""Fine-tuning on conversations: packing changes no loss, only answers are learned, and the run is a chat model."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gptjax import export, verify
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.data.batches import starts, windows
from gptjax.data.packing import CONTEXT, FIRST, ID, PackedTokens, entries_of, pack
from gptjax.data.token_files import UINT32, Tokens, write_tokens
from gptjax.errors import UserError
from gptjax.hub.init_from import open_pretrained
from gptjax.inference.language_model import LanguageModel
from gptjax.inference.sampling import Sampling
from gptjax.loop import train
from gptjax.model import GPT, param_shapes
from gptjax.reporting.report import read_metrics
from gptjax.run_dir import load_run
from gptjax.sharding import make_mesh, one_device, with_shardings
from gptjax.training import compile_steps, loss_sum

MODEL = ModelConfig(vocab_size=40, n_layer=1, n_head=2, n_embd=16, block_size=16, bias=True, dtype="float32")
TRAIN = TrainConfig(max_steps=6, batch_size=8, eval_interval=3, save_interval=3, log_interval=1)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Conversations of 2 to 20 random tokens in windows of 17."""
    path, rng = tmp_path_factory.mktemp("packed") / "train.bin", np.random.default_rng(0)
    lengths = rng.integers(2, 20, 60)
    write_tokens(
        path, [entries_of(rng.integers(0, 40, n).astype(np.int32), rng.random(n) < 0.6) for n in lengths], UINT32
    )
    return PackedTokens(Tokens([path], UINT32), 16)


def windows_of(packed, n=None):
    every = np.arange(len(packed._windows))[:n] * 16
    return windows(packed, every, 16)


@given(st.lists(st.integers(1, 30), max_size=60))
@settings(deadline=None)
def test_packing_keeps_each_piece_once_and_wastes_little(lengths):
    packing = pack(np.array(lengths, int), 30)
    assert sorted(i for window in packing for i in window) == list(range(len(lengths)))
    rooms = [30 - sum(lengths[i] for i in window) for window in packing]
    assert all(room >= 0 for room in rooms)
    assert len(packing) <= 1 or sum(sorted(30 - room for room in rooms)[:2]) > 30  # no two windows fit into one


def test_each_conversation_is_drawn_once_an_epoch_in_a_new_order(packed):
    n = len(packed._windows)
    draws = [starts(len(packed), block_size=16, batch_size=n, seed=1, step=step, order="epoch") for step in range(2)]
    assert (draws[0] != draws[1]).any()
    for draw in draws:
        entries = np.concatenate([window[window >= 0] for window in windows(packed, draw, 16)])
        assert (entries & FIRST != 0).sum() == packed.n_all - packed.n_left_out
        assert sorted(np.unique(draw)) == list(range(0, 16 * n, 16))


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("attention", ["plain", "blockwise"])
def test_packing_changes_no_loss_and_no_gradient(scramble, packed, position, attention, assert_trees_close):
    """The same as with each conversation alone in its window, at its beginning."""
    config = replace(MODEL, position=position, attention=attention)
    params, together = scramble(config), windows_of(packed)
    parts = [part for row in together for part in np.split(row[row >= 0], np.flatnonzero(row[row >= 0] & FIRST)[1:])]
    alone = np.stack([np.pad(part, (0, 17 - len(part)), constant_values=-1) for part in parts])

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params, windows_BW):
        return loss_sum(GPT(config), params, windows_BW, packed=True)

    ((one, n), gradients), ((other, m), expected) = (loss(params, jnp.asarray(rows)) for rows in (together, alone))
    assert n == m == (together[:, 1:] & CONTEXT == 0).sum() and len(alone) > len(together) > 10
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert_trees_close(gradients, expected, rtol=1e-4, atol=1e-4)


def test_neither_questions_nor_padding_are_learned(scramble, packed):
    """By hand: the loss is that of the predicted tokens, given the tokens before them in their conversation."""
    params, row = scramble(MODEL), windows_of(packed)[0]
    first, ids = np.flatnonzero(row & FIRST), np.maximum(row & ID, 0)
    nats, logits_of = 0.0, jax.jit(GPT(MODEL).apply)
    for start, end in zip(first, [*first[1:], len(row)], strict=True):
        if row[start] < 0:
            break
        part = np.pad(ids[start:end][:16], (0, max(0, 16 - (end - start))))[None]
        log_probs = np.asarray(jax.nn.log_softmax(logits_of({"params": params}, part)[0]))
        nats -= sum(log_probs[i - 1, ids[start + i]] for i in range(1, end - start) if not row[start + i] & CONTEXT)
    actual, n = jax.jit(lambda: loss_sum(GPT(MODEL), params, jnp.asarray(row)[None], packed=True))()
    np.testing.assert_allclose(actual, nats, rtol=1e-5)
    assert n == (row[1:] & CONTEXT == 0).sum()


def test_a_step_is_the_mean_over_predicted_tokens_on_any_mesh_and_in_any_micro_steps(packed):
    config = Config(model=MODEL, train=replace(TRAIN, accumulate=2, batch_size=16), data=DataConfig(format="chat"))
    batch, steps = windows_of(packed, 16), compile_steps(config, make_mesh(MeshConfig(data=2, fsdp=2), 8))
    state = steps.init()
    params = jax.device_get(state.params)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        return loss_sum(GPT(MODEL), params, jnp.asarray(batch), packed=True)

    (nats, n), gradients = loss(params)
    _, metrics = steps.train(state, batch.reshape(2, 8, -1))
    np.testing.assert_allclose(metrics["train_loss"], nats / n, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients) / n, rtol=1e-4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    turns = [("user", "Who are you?"), ("assistant", "A bard."), ("user", "Sing!"), ("assistant", "O for a muse!")]
    with open(folder / "chat.jsonl", "w") as file:
        for i in range(60):
            messages = [{"role": role, "content": f"{text} {i % 7}"} for role, text in turns]
            messages[0]["content"] += " <|im_end|>" * (i == 5)
            file.write(json.dumps({"messages": messages[: 2 + 2 * (i % 2)]}) + "\n")
    (folder / "text.txt").write_text(
        "Who are you? A bard. Sing! O for a muse! user assistant 0123456 <|im_end|>\n" * 40
    )
    return DataConfig(source=str(folder / "chat.jsonl"), format="chat", dir=str(folder / "data"))


def config_of(data, **train):
    model = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=96, dtype="float32")
    return Config(data=data, model=model, train=replace(TRAIN, batch_size=8, **train), mesh=MeshConfig(data=1))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert train(config_of(data), folder, resume=False) == 0
    return folder


def test_a_run_is_a_chat_model_that_sampling_and_export_know(run, tmp_path):
    model = LanguageModel.load(str(run))
    end = model.tokenizer.token_id("<|im_end|>")
    assert end in model.stop_tokens and model.config.vocab_size == model.tokenizer.vocab_size
    prompt = model.chat_prompt([{"role": "user", "content": "Who are you? <|im_end|>"}])
    assert model.tokenizer.decode(prompt).endswith("<|im_end|>\n<|im_start|>assistant\n") and (prompt == end).sum() == 1
    *_, [answer] = model.answer([prompt], 5, Sampling(temperature=0.0), [0])
    assert answer.tokens
    export.main([str(run), str(tmp_path / "model")])
    again = LanguageModel.load(str(tmp_path / "model"))
    assert (again.template, again.stop_tokens) == (model.template, model.stop_tokens)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "Who are you?"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert expected == again.chat_prompt(messages).tolist() and theirs.eos_token == "<|im_end|>"


def test_a_run_resumes_bit_for_bit_and_is_verified(data, run, state_of, tmp_path, capsys):
    assert train(config_of(data, max_steps=3), tmp_path / "run", resume=False) == 0
    config = replace(config_of(data), optimizer=OptimizerConfig(decay_steps=3))
    assert train(config, tmp_path / "run", resume=True) == 0
    straight = tmp_path / "straight"
    assert train(config, straight, resume=False) == 0
    for ours, theirs in zip(
        *(jax.tree.leaves(state_of(folder)[1]) for folder in (tmp_path / "run", straight)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    capsys.readouterr()
    assert verify.main([str(run)]) == 0
    assert "everything agrees bit for bit" in capsys.readouterr().out


def test_a_text_model_learns_to_chat_with_rows_for_the_new_tokens(data, tmp_path):
    """The new rows begin as the mean of the others. LoRA, which trains no embeddings, is refused."""
    text = replace(data, source=data.source.replace("chat.jsonl", "text.txt"), format="text")
    assert train(config_of(text, max_steps=1), tmp_path / "text", resume=False) == 0
    weights = open_pretrained(str(tmp_path / "text"))
    config = weights.adapt(replace(config_of(data), init_from=str(tmp_path / "text")))
    with pytest.raises(UserError, match="lora_rank=2 trains no embeddings.*<|im_end|>"):
        train(replace(config, model=replace(config.model, lora_rank=2)), tmp_path / "lora", False, weights)
    assert train(config, tmp_path / "chat", False, weights) == 0
    losses = read_metrics(tmp_path / "chat" / "metrics.csv")["val_loss"]
    assert losses[-1] < losses[0]
    (_, before, old), (chat, _, new) = (load_run(tmp_path / name, "best") for name in ("text", "chat"))
    assert chat.model.vocab_size == new.vocab_size == old.vocab_size + 2
    shapes = param_shapes(chat.model)
    start = weights.load(chat.model, with_shardings(one_device(), shapes), 0)
    rows = np.asarray(start["token_embedding"])
    np.testing.assert_array_equal(rows[: old.vocab_size], before["token_embedding"])
    np.testing.assert_allclose(
        rows[old.vocab_size :], rows[None, : old.vocab_size].mean(axis=1).repeat(2, 0), atol=1e-7
    )
    chatting = open_pretrained(str(tmp_path / "chat"))  # a chat model knows the tokens: LoRA can go on from it
    tuned = chatting.adapt(replace(config_of(data, max_steps=1), init_from=str(tmp_path / "chat")))
    tuned = replace(tuned, model=replace(tuned.model, lora_rank=2))
    assert train(tuned, tmp_path / "lora", False, chatting) == 0
    assert LanguageModel.load(str(tmp_path / "lora")).template == LanguageModel.load(str(tmp_path / "chat")).template
