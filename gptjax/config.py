"""What a run is: frozen dataclasses, checked where they are built, and the command line made from them."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gptjax.errors import UserError


def option(default: Any, help: str, *, free_on_resume: bool = False, architecture: bool = True) -> Any:
    """A config field with its default and the sentence that `--help` prints.

    `free_on_resume`: a resumed run may change it, as it does not change what a step computes (but for rounding).
    `architecture`: of a model field, whether a checkpoint determines it; what is false is the run's own choice.
    """
    return field(
        default=default, metadata={"help": help, "free_on_resume": free_on_resume, "architecture": architecture}
    )


def argument(help: str, many: bool = False) -> Any:
    """A field that the command line gives by its place, without a name; the empty default never shows."""
    return field(default=() if many else "", metadata={"help": help, "positional": True})


class Section:
    """Checks every field's type where a section is built: by a file, by the command line or from JSON alike."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            self.require(is_instance(getattr(self, name), hint), name, f"is not {type_name(hint)}")
        self.validate()

    def validate(self) -> None:
        """Raise `UserError` where the values do not fit together."""

    def require(self, condition: bool, name: str, complaint: str) -> None:
        """Raise `UserError` that names the field as the command line does: `model.n_embd=100 ...`."""
        if not condition:
            section = type(self).__name__.removesuffix("Config").lower()
            prefix = f"{section}." if section in SECTIONS else ""
            raise UserError(f"{prefix}{name}={getattr(self, name)!r} {complaint}")


@dataclass(frozen=True)
class DataConfig(Section):
    source: str = option(
        "shakespeare",
        "'shakespeare' (the complete plays, bundled), a UTF-8 text file, a folder of them, a URL, "
        "or a folder of token files (nanoGPT's train.bin and val.bin, or llm.c's shards), also at gs:// or s3://",
        free_on_resume=True,
    )
    tokenizer: str = option(
        "char", "'char', 'bpe' (trained on the corpus), 'gpt2', or the path of a tokenizer.json", free_on_resume=True
    )
    vocab_size: int = option(4096, "tokens that a 'bpe' tokenizer learns")
    val_fraction: float = option(0.1, "the part of the text, at its end, that validates")
    order: Literal["random", "epoch"] = option(
        "random", "'random' windows, or 'epoch': every window once per epoch, shuffled"
    )
    sha256: str | None = option(None, "checksum that a download must have", free_on_resume=True)
    dir: str = option("data", "folder for prepared token files and downloads", free_on_resume=True)

    def validate(self) -> None:
        self.require(self.vocab_size >= 257, "vocab_size", "is less than 257: 256 bytes and the end-of-text token")
        self.require(0 < self.val_fraction < 1, "val_fraction", "is not between 0 and 1")


LINEAR_LAYERS = ("query", "key", "value", "out", "up", "gate", "down")


@dataclass(frozen=True)
class ModelConfig(Section):
    vocab_size: int = option(0, "distinct tokens; 0: as many as the tokenizer has")
    block_size: int = option(256, "context length in tokens", architecture=False)
    n_layer: int = option(6, "transformer blocks")
    n_head: int = option(6, "attention heads; n_embd is split evenly over them")
    n_embd: int = option(384, "width of the residual stream")
    n_kv_head: int = option(0, "key and value heads, each shared by a group of attention heads; 0: n_head")
    mlp_width: int = option(0, "features inside an MLP; 0: 4 n_embd")
    activation: Literal["gelu_tanh", "gelu_erf", "swiglu", "relu2"] = option(
        "gelu_tanh", "of the MLP: GELU in GPT-2's tanh form or nanoGPT's exact one, SwiGLU as in Llama, or ReLU squared"
    )
    norm: Literal["layernorm", "rmsnorm", "nonparametric_rmsnorm"] = option(
        "layernorm", "LayerNorm as in GPT-2, or RMSNorm: with weights as in Llama, or without"
    )
    norm_eps: float = option(1e-5, "added to the variance, or to the mean square")
    position: Literal["learned", "rope"] = option("learned", "learned embeddings, or rotary ones as in Llama")
    rope_theta: float = option(10_000.0, "rope: the base of its wavelengths")
    rope_factor: float = option(1.0, "rope: how far Llama 3's scaling stretches long wavelengths; 1: not at all")
    rope_original_block_size: int = option(8192, "rope: the context length before that stretching")
    qk_norm: bool = option(False, "each head's queries and keys are divided by their root mean square")
    embedding_norm: bool = option(False, "embeddings are divided by their root mean square before the first block")
    logit_cap: float = option(0.0, "logits x become logit_cap tanh(x / logit_cap); 0: as they are")
    bias: bool = option(False, "biases in linear layers and LayerNorms, as GPT-2 has them")
    qkv_bias: bool = option(False, "biases in queries, keys and values alone, as Qwen2.5 has them")
    tied_head: bool = option(True, "the output head is the token embedding; false: a matrix of its own")
    lora_rank: int = option(
        0, "train low-rank updates of linear layers and freeze all else; 0: train everything", architecture=False
    )
    lora_alpha: float = option(16.0, "LoRA: updates are scaled by lora_alpha / lora_rank", architecture=False)
    lora_layers: str = option(",".join(LINEAR_LAYERS), "LoRA: the linear layers that have updates", architecture=False)
    dropout: float = option(
        0.0,
        "dropout on the embedding, the attention weights and both residual branches, rounded to 256ths",
        architecture=False,
    )
    attention_dropout: float | None = option(
        None,
        "dropout's rate for the attention weights alone; 0 allows attention that is not plain; none: as dropout",
        architecture=False,
    )
    separator: int | None = option(
        None,
        "token that begins a document (GPT-2's: 50256); in training attention does not look back past it",
        architecture=False,
    )
    attention: Literal["auto", "plain", "blockwise", "splash", "cudnn"] = option(
        "auto",
        "in training: plain, blockwise (less memory, on any hardware), Pallas's kernel for TPUs or cuDNN's for GPUs; "
        "auto: the hardware's where it can, else blockwise where the context is long",
        architecture=False,
        free_on_resume=True,
    )
    layers: Literal["auto", "unrolled", "looped"] = option(
        "auto",
        "in training: one after another, or a loop that compiles faster; auto: unrolled on CPU",
        architecture=False,
        free_on_resume=True,
    )
    remat: Literal["none", "dots", "full"] = option(
        "none",
        "computed again in the backward pass to save memory: nothing, all but matrix products, or whole layers",
        architecture=False,
        free_on_resume=True,
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "of activations; auto: bfloat16 on TPU, GPU and CPUs that multiply it faster, else float32",
        architecture=False,
    )

    def validate(self) -> None:
        for name in "block_size n_layer n_head n_embd norm_eps rope_theta lora_alpha".split():
            self.require(getattr(self, name) > 0, name, "is not positive")
        for name in ("vocab_size", "n_kv_head", "mlp_width", "lora_rank", "logit_cap"):
            self.require(getattr(self, name) >= 0, name, "is negative")
        fit = self.n_embd // self.n_head * self.n_head or self.n_head
        self.require(
            self.n_embd % self.n_head == 0,
            "n_embd",
            f"is not divisible by model.n_head={self.n_head}; {fit} or {fit + self.n_head} would be",
        )
        shared = f"does not divide model.n_head={self.n_head}"
        self.require(self.n_head % self.kv_heads == 0, "n_kv_head", shared)
        odd = f"with {self.n_head} heads is {self.head_width} a head: rotary positions need an even width"
        self.require(self.position == "learned" or self.head_width % 2 == 0, "n_embd", odd)
        self.require(self.rope_factor >= 1, "rope_factor", "is less than 1")
        self.require(self.rope_original_block_size > 0, "rope_original_block_size", "is not positive")
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
        """Of dropout on the attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def drops(self) -> bool:
        """Whether there is any dropout."""
        return self.dropout > 0 or self.attention_rate > 0

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def mlp_features(self) -> int:
        return self.mlp_width or 4 * self.n_embd

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: from 1,024 tokens on a multiple of 128, for the hardware's tiles and for sharding."""
        return self.vocab_size if self.vocab_size < 1024 else -(-self.vocab_size // 128) * 128


@dataclass(frozen=True)
class OptimizerConfig(Section):
    learning_rate: float = option(1e-3, "at the end of the warm-up")
    min_learning_rate: float = option(1e-4, "at the end of the decay and after it")
    schedule: Literal["cosine", "linear"] = option(
        "cosine", "after the warm-up: a cosine, or constant and then linear (warmup-stable-decay)"
    )
    warmup_steps: int = option(100, "steps of linear warm-up")
    decay_steps: int | None = option(None, "step at which the decay ends; none: train.max_steps", free_on_resume=True)
    decay_fraction: float = option(0.5, "linear: the part of decay_steps, at its end, that decays")
    beta1: float = option(0.9, "AdamW's decay of the mean of gradients")
    beta2: float = option(0.99, "AdamW's decay of the mean of squared gradients")
    weight_decay: float = option(0.1, "AdamW's decay of matrices; biases and LayerNorms have none")
    matrix_optimizer: Literal["adamw", "muon"] = option(
        "adamw", "of the blocks' matrices: AdamW as for all else, or Muon"
    )
    muon_learning_rate: float = option(0.02, "Muon's at the end of the warm-up; it follows the shape of learning_rate")
    muon_weight_decay: float = option(0.0, "Muon's decay of its matrices")
    grad_clip: float = option(1.0, "largest global norm of the gradient; 0: no clipping")

    def validate(self) -> None:
        for name in ("learning_rate", "muon_learning_rate"):
            self.require(getattr(self, name) > 0, name, "is not positive")
        limit = f"is not in [0, optimizer.learning_rate={self.learning_rate}]"
        self.require(0 <= self.min_learning_rate <= self.learning_rate, "min_learning_rate", limit)
        self.require(self.decay_steps is None or self.decay_steps > 0, "decay_steps", "is not positive")
        self.require(0 < self.decay_fraction <= 1, "decay_fraction", "is not in (0, 1]")
        for name in ("warmup_steps", "weight_decay", "muon_weight_decay", "grad_clip"):
            self.require(getattr(self, name) >= 0, name, "is negative")
        for name in ("beta1", "beta2"):
            self.require(0 <= getattr(self, name) < 1, name, "is not in [0, 1)")


@dataclass(frozen=True)
class TrainConfig(Section):
    max_steps: int = option(2000, "optimizer steps", free_on_resume=True)
    batch_size: int = option(12, "windows of block_size tokens in one optimizer step, over all devices and micro-steps")
    accumulate: int = option(1, "micro-steps that one step's batch is split into, to save memory")
    eval_interval: int = option(250, "steps between evaluations", free_on_resume=True)
    eval_batches: int = option(
        0,
        "validation batches in an evaluation; 0: the whole split, each token once; 4 at most before the first step",
        free_on_resume=True,
    )
    save_interval: int = option(250, "steps between checkpoints; the last step is always saved", free_on_resume=True)
    log_interval: int = option(10, "steps between rows of metrics.csv", free_on_resume=True)
    patience: int = option(
        0, "stop after so many evaluations without a better validation loss; 0: never", free_on_resume=True
    )
    seed: int = option(1337, "of initialization, batches and dropout")

    def validate(self) -> None:
        for name in ("max_steps", "batch_size", "accumulate", "eval_interval", "save_interval", "log_interval"):
            self.require(getattr(self, name) > 0, name, "is not positive")
        for name in ("eval_batches", "patience"):
            self.require(getattr(self, name) >= 0, name, "is negative")
        self.require(0 <= self.seed < 2**32, "seed", "is not in [0, 2**32)")
        divides = f"does not divide into train.accumulate={self.accumulate} equal micro-steps"
        self.require(self.batch_size % self.accumulate == 0, "batch_size", divides)


@dataclass(frozen=True)
class MeshConfig(Section):
    data: int = option(-1, "devices over which a batch is split; -1: the rest", free_on_resume=True)
    fsdp: int = option(
        0,
        "devices over which a batch, parameters and optimizer state are split; -1: the rest; 0: 1, or where the state "
        "would then fill more than half of a device's memory, the rest",
        free_on_resume=True,
    )
    tensor: int = option(1, "devices over which heads, MLP and vocabulary are split", free_on_resume=True)

    def validate(self) -> None:
        for name in ("data", "fsdp", "tensor"):
            known = getattr(self, name) >= 1 or getattr(self, name) == -1 or (name == "fsdp" and self.fsdp == 0)
            self.require(known, name, "is neither positive nor -1")
        rest = [name for name in ("data", "fsdp", "tensor") if getattr(self, name) == -1]
        self.require(len(rest) <= 1, rest[-1] if rest else "data", "is the second -1: only one axis can be the rest")


@dataclass(frozen=True)
class Config(Section):
    """One training run."""

    init_from: str | None = option(
        None,
        "weights to start from: a Hugging Face folder, the name of a model on its hub, a run's folder or nanoGPT's "
        "ckpt.pt; model fields then come from there, but for block_size (which may be less), dropout, dtype and lora_*",
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def validate(self) -> None:
        idle = self.optimizer.matrix_optimizer == "muon" and self.model.lora_rank > 0
        self.optimizer.require(not idle, "matrix_optimizer", "trains no updates of LoRA's: pass adamw")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(path: Path) -> "Config":
        """The config that `to_json` wrote to `path`.

        Raises:
            UserError: there is none, or it is not one.
        """
        try:
            sections = json.loads(path.read_text())
            for name, harmless in RETIRED.items():
                section, _, field = name.partition(".")
                value = sections.get(section, {}).pop(field, harmless)
                if harmless is not None and value != harmless:
                    raise UserError(f"{path}: {name}={value!r} is from gptjax 0.1, and no later version can run it")
            return Config(**{k: SECTIONS[k](**values) if k in SECTIONS else values for k, values in sections.items()})
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; a run directory holds a config.json") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a config of this version of gptjax: {error}") from error


# Fields of config.json that gptjax 0.1 wrote, with the value at which they change nothing (None: any value).
RETIRED = {"data.bpe_dropout": None, "model.zero_init": None, "model.ngram_rows": None, "model.ngram": 1}
SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "mesh": MeshConfig,
}


def is_instance(value: Any, hint: Any) -> bool:
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
    if typing.get_origin(hint) is tuple:
        return type_name(typing.get_args(hint)[0])
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "none"}
    if typing.get_origin(hint) is Literal:
        return " or ".join(typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return " or ".join(type_name(option) for option in typing.get_args(hint))
    return names.get(hint, hint.__name__)


def flat(config: Config) -> dict[str, Any]:
    """Each field's value by the name that the command line gives it, as "train.max_steps"."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        flat |= {f"{name}.{field}": v for field, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def field_metadata(name: str) -> Mapping[str, Any]:
    """What `option` notes of the field that the command line calls `name`."""
    section, _, field = name.rpartition(".")
    fields: dict[str, dataclasses.Field[Any]] = vars(SECTIONS[section] if section else Config)["__dataclass_fields__"]
    return fields[field].metadata
