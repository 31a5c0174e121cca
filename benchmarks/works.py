"""The work of contenders: each function returns facts and a function that works once and returns its seconds."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.cli import load_config_file
from gptjax.config import Config, DataConfig, ModelConfig, TrainConfig

Work = tuple[dict[str, Any], Callable[[], float]]
# Layers, heads and width; and windows of so many tokens.
GPT2_SIZES = {"gpt2_124m": (12, 12, 768), "gpt2_350m": (24, 16, 1024)}
GPT2 = {"gpt2_124m": (2, 256), "gpt2_124m_16x1024": (16, 1024), "gpt2_350m_8x1024": (8, 1024)}


def config_of(work: str) -> Config:
    """The config of a piece of work, with the vocabulary size that its data would give."""
    if work in GPT2:
        (batch_size, block_size), (n_layer, n_head, n_embd) = GPT2[work], GPT2_SIZES[work[:9]]
        sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}
        return Config(
            data=DataConfig(source=""),
            model=ModelConfig(vocab_size=50257, bias=False, **sizes),
            train=TrainConfig(batch_size=batch_size),
        )
    config = load_config_file(Path("configs") / f"{work}.py")
    return replace(config, model=replace(config.model, vocab_size=65))


def timed(step: Callable[[], object], seconds: float = 2.0) -> Callable[[], float]:
    """A function that repeats a step for so long and returns the mean seconds of one."""

    def turn() -> float:
        n, start = 0, time.perf_counter()
        while not n or time.perf_counter() - start < seconds:
            step()
            n += 1
        return (time.perf_counter() - start) / n

    return turn


def _windows(config: Config) -> np.ndarray:
    shape = (config.train.batch_size, config.model.block_size + 1)
    return np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)


def our_step(work: str, dtype: str, layers: Any = "auto", piece_share: float = 0.0) -> Work:
    """The step that train.py compiles, on as many CPU devices as it takes."""
    config = config_of(work)
    config = replace(config, model=replace(config.model, dtype=dtype, layers=layers))
    from gptjax import cpu
    from gptjax.host import use_cores

    use_cores(config.train.batch_size, cpu.n_devices(config))
    import jax

    from gptjax import flops, loss
    from gptjax.resolve import resolve
    from gptjax.sharding import batch_sharding, make_mesh
    from gptjax.training import compile_steps

    loss.PIECE_SHARE = piece_share or loss.PIECE_SHARE
    config = replace(config, model=resolve(config.model, jax.devices()[0]))
    mesh = make_mesh(config.mesh, config.train.batch_size)
    steps = compile_steps(config, mesh)
    state = steps.init()
    windows_ABW = jax.device_put(_windows(config)[None], batch_sharding(mesh))

    def step() -> None:
        nonlocal state
        state, metrics = steps.train(state, windows_ABW)
        jax.block_until_ready((state, metrics))

    step()
    return {"flops": flops.step_flops(config, state.params)}, timed(step)


def _torch_device() -> str:
    """A GPU if PyTorch has one, with TF32 matmuls as in nanoGPT; it must where JAX is told to use one."""
    import torch

    if os.environ.get("JAX_PLATFORMS", "").startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"PyTorch {torch.__version__} has no CUDA: install a build that has, or name --rival_python")

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_step(work: str, dtype: str, compiled: bool) -> Work:
    """nanoGPT's step in PyTorch, by tests/parity/reference.py: forward, backward, clipping and AdamW."""
    import torch

    from tests.parity.reference import Reference, Trainer

    config, device = config_of(work), _torch_device()
    reference = Reference(config.model, config.model.dropout).to(device)
    if compiled:  # forward and loss, as nanoGPT has them in one module
        reference.loss = torch.compile(reference.loss)
    trainer = Trainer(reference, config.optimizer, config.train.max_steps)
    windows = torch.from_numpy(_windows(config)).long().to(device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            trainer.train([windows])

    step()
    return {}, timed(step)


def our_matmul(dtype: str) -> Work:
    """Seconds of a TFLOP of matmuls, at their fastest."""
    from gptjax.host import use_cores

    use_cores(2, 0)
    import jax

    from gptjax.flops import measured_matmul_peak

    size = 1024 if jax.default_backend() == "cpu" else 8192
    return {}, lambda: 1e12 / measured_matmul_peak(jax.devices(), dtype, size=size, seconds=1.0)


def memory() -> Work:
    """Seconds to read a GB with all cores, or with the GPU that JAX has, at their fastest."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() != "cpu":
        ones, total = jnp.ones(1 << 30), jax.jit(jnp.sum)
        total(ones).block_until_ready()
        turn = timed(lambda: total(ones).block_until_ready(), 0.5)
        return {}, lambda: turn() / (ones.nbytes / 1e9)
    from concurrent.futures import ThreadPoolExecutor

    from gptjax.host import n_cores

    parts = [np.ones(1 << 27, np.float32) for _ in range(n_cores())]  # 512 MiB each: far more than any cache
    pool = ThreadPoolExecutor(len(parts))

    def read() -> float:
        start = time.perf_counter()
        list(pool.map(np.max, parts))
        return (time.perf_counter() - start) / (sum(part.nbytes for part in parts) / 1e9)

    return {}, lambda: min(read() for _ in range(5))


def our_sampling(work: str, dtype: str, streams: int, n_tokens: int) -> Work:
    """Seconds a token of `generate`, as sample.py calls it, from one new line; of all streams together."""
    config = replace(config_of(work).model, dtype="bfloat16" if dtype == "bfloat16" else "float32")
    from gptjax import host

    host.prepare()
    import jax

    from gptjax.inference.decoder import lay_out
    from gptjax.inference.generate import generate
    from gptjax.inference.quantize import quantize
    from gptjax.inference.sampling import Sampling
    from gptjax.model import init_params

    params = jax.jit(lambda: init_params(config, 0))()
    if dtype == "bfloat16":
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    elif dtype == "int8":
        params = quantize(params)
    if jax.default_backend() != "tpu":
        params = lay_out(params)
    prompts, seeds = [np.array([1], np.int32)] * streams, list(range(streams))

    def run() -> float:
        start = time.perf_counter()
        for _ in generate(config, params, prompts, n_tokens, Sampling(temperature=0.8, top_k=200), seeds):
            pass
        return (time.perf_counter() - start) / (n_tokens * streams)

    n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - params["position_embedding"].nbytes
    return {"bytes": n_bytes}, run


def nanogpt_sampling(work: str, streams: int, n_tokens: int, dtype: str) -> Work:
    """Seconds a token of nanoGPT's `generate`, which reads the last block_size tokens again for every token."""
    import torch

    from tests.parity.reference import Reference

    config, device = config_of(work).model, _torch_device()
    reference = Reference(config).eval().to(device)

    @torch.no_grad()
    def run() -> float:
        tokens, start = torch.ones(streams, 1, dtype=torch.long, device=device), time.perf_counter()
        for _ in range(n_tokens):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = reference.last_logits(tokens[:, -config.block_size :]) / 0.8
            most = torch.topk(logits, min(200, config.vocab_size)).values
            logits[logits < most[:, [-1]]] = -float("inf")
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], dim=1)
        tokens.tolist()
        return (time.perf_counter() - start) / (n_tokens * streams)

    return {}, run


def _transformers_gpt2(config: ModelConfig) -> Any:
    """transformers' GPT-2 of these sizes with random weights."""
    import torch
    import transformers

    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    torch.manual_seed(0)
    names = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=config.vocab_size, n_positions=config.block_size, **sizes, **names)
    ).eval()


def transformers_sampling(work: str, streams: int, n_tokens: int, dtype: str) -> Work:
    """Seconds a token of transformers' `generate` with its KV cache."""
    import torch

    device = _torch_device()
    model = _transformers_gpt2(config_of(work).model).to(device, getattr(torch, dtype))

    @torch.no_grad()
    def run() -> float:
        tokens, start = torch.ones(streams, 1, dtype=torch.long, device=device), time.perf_counter()
        options = {"max_new_tokens": n_tokens, "do_sample": True, "temperature": 0.8, "top_k": 200, "use_cache": True}
        model.generate(tokens, attention_mask=torch.ones_like(tokens), **options).tolist()
        return (time.perf_counter() - start) / (n_tokens * streams)

    return {}, run


def ctranslate2_sampling(work: str, streams: int, n_tokens: int, dtype: str) -> Work:
    """Seconds a token of CTranslate2's generator, with the weights of `transformers_sampling` in this dtype."""
    import ctranslate2
    import transformers
    from tokenizers import Tokenizer, models

    from gptjax.host import n_cores

    model = _transformers_gpt2(config_of(work).model)
    model.config.bos_token_id = model.config.eos_token_id = 0  # required by the converter, as names of tokens are
    names = Tokenizer(models.WordLevel({f"t{i}": i for i in range(model.config.vocab_size)}, unk_token="t0"))
    special = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "t0")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/transformers")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=names, **special)
        tokenizer.save_pretrained(f"{folder}/transformers")
        ctranslate2.converters.TransformersConverter(f"{folder}/transformers").convert(f"{folder}/converted")
        threads = {"inter_threads": 1, "intra_threads": n_cores()}
        generator = ctranslate2.Generator(f"{folder}/converted", compute_type=dtype, **threads)

    def run() -> float:
        start = time.perf_counter()
        answers = generator.generate_batch(
            [["t1"]] * streams,
            include_prompt_in_result=False,
            min_length=n_tokens,
            max_length=n_tokens,
            sampling_topk=min(200, model.config.vocab_size),
            sampling_temperature=0.8,
        )
        assert all(len(answer.sequences_ids[0]) == n_tokens for answer in answers)
        return (time.perf_counter() - start) / (n_tokens * streams)

    return {}, run


def our_batches(folder: str, block_size: int, batch_size: int) -> Work:
    """Seconds a batch of inputs and targets from token files."""
    from gptjax.data.batches import starts, windows
    from gptjax.data.token_files import open_split

    tokens, steps = open_split(Path(folder), "train"), iter(range(1 << 60))

    def batch() -> object:
        at = starts(len(tokens), block_size=block_size, batch_size=batch_size, seed=0, step=next(steps))
        return windows(tokens, at, block_size, vocab_size=50257)

    return {}, timed(batch, 0.5)


def nanogpt_batches(folder: str, block_size: int, batch_size: int) -> Work:
    """Seconds of nanoGPT's get_batch."""
    import torch

    def batch() -> object:
        tokens = np.memmap(Path(folder) / "train.bin", dtype=np.uint16, mode="r")
        at = torch.randint(len(tokens) - block_size, (batch_size,))
        inputs = torch.stack([torch.from_numpy(tokens[i : i + block_size].astype(np.int64)) for i in at])
        targets = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + block_size].astype(np.int64)) for i in at])
        return inputs, targets

    return {}, timed(batch, 0.5)


def our_characters(corpus: str) -> Work:
    """Seconds a million characters, from text to ids."""
    from gptjax.tokenizer import Tokenizer

    text = Path(corpus).read_text()
    tokenizer = Tokenizer.characters(sorted(set(text)))
    return {}, _per_million(text, timed(lambda: tokenizer.encode(text), 0.5))


def nanogpt_characters(corpus: str) -> Work:
    """Seconds a million characters of nanoGPT's prepare.py."""
    text = Path(corpus).read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    return {}, _per_million(text, timed(lambda: np.array([ids[c] for c in text], dtype=np.uint16), 0.5))


def our_bpe(corpus: str, vocabulary: str) -> Work:
    """Seconds a million characters by GPT-2's vocabulary, in documents of 2,000 characters, on one core."""
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from gptjax.tokenizer import Tokenizer

    tokenizer, documents = Tokenizer.from_name_or_path(vocabulary), _documents(corpus)
    return {}, _per_million("".join(documents), timed(lambda: tokenizer.encode_batch(documents), 0.5))


def tiktoken_bpe(corpus: str, vocabulary: str) -> Work:
    """Seconds a million characters by the library of nanoGPT's prepare.py, on one core."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    files = [str(Path(vocabulary) / name) for name in ("vocab.bpe", "encoder.json")]
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    ranks, documents = data_gym_to_mergeable_bpe_ranks(*files), _documents(corpus)
    encoding = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    work = timed(lambda: [encoding.encode_ordinary(document) for document in documents], 0.5)
    return {}, _per_million("".join(documents), work)


def _documents(corpus: str) -> list[str]:
    text = Path(corpus).read_text()
    return [text[i : i + 2000] for i in range(0, len(text), 2000)]


def _per_million(text: str, work: Callable[[], float]) -> Callable[[], float]:
    return lambda: work() / len(text) * 1e6
