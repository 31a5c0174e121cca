"""The weights that a run starts from when it does not draw them: `--init_from`."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from gptjax.config import Config, DataConfig, ModelConfig
from gptjax.data.prepare import Dataset
from gptjax.errors import UserError
from gptjax.hub.weights import (
    copy_side_files,
    folder_of,
    load_params,
    locate,
    merge_lora,
    open_weights,
    reuse_params,
    tokenizer_of,
)
from gptjax.run_dir import holds_run, load_run
from gptjax.tokenizer import Tokenizer


@dataclass(frozen=True)
class PretrainedWeights:
    """Weights to start from: their config and tokenizer, and how to load them (`gptjax.loop.InitialWeights`)."""

    config: ModelConfig
    tokenizer: str  # as data.tokenizer names it
    folder: Path
    load: Callable[[ModelConfig, Any, int], Any]  # config, abstract parameters, seed for LoRA -> parameters

    def adapt(self, config: Config) -> Config:
        """The config with this architecture, and with this tokenizer unless it names one.

        Raises `UserError` if it sets a field to a value that the weights do not have.
        """
        named = config.data.tokenizer != DataConfig().tokenizer
        data = config.data if named else replace(config.data, tokenizer=self.tokenizer)
        return replace(config, model=_adopt(config.model, self.config), data=data)

    def require_fit(self, dataset: Dataset, run_dir: Path, config: ModelConfig) -> None:
        """Raise `UserError` unless the tokens are of the weights' own tokenizer, and the run has its own folder.

        Conversations may have special tokens more, which only a run that trains the embeddings can learn.
        """
        own, tokens = Tokenizer.from_name_or_path(self.tokenizer).vocabulary(), dataset.tokenizer.vocabulary()
        new = sorted(tokens.keys() - own.keys()) if dataset.side_files and own.items() <= tokens.items() else []
        if new and config.lora_rank:
            raise UserError(
                f"model.lora_rank={config.lora_rank} trains no embeddings, and {', '.join(new)} would be new tokens of "
                f"{self.folder}, which has no chat template: train all parameters, or start from a chat model"
            )
        if own != tokens and not new:
            raise UserError(
                f"{dataset.folder} was made with another tokenizer than the weights of {self.folder}: "
                f"pass --data.tokenizer {self.tokenizer}, and a --data.source of text"
            )
        if run_dir.resolve() == self.folder.resolve():
            raise UserError(f"out_dir={run_dir} is where the weights to start from are: name another --out_dir")

    def copy_side_files(self, run_dir: Path) -> None:
        """Copy the chat template, the stop tokens and the like, so that the run's folder is self-contained."""
        copy_side_files(self.folder, run_dir)


def open_pretrained(name: str) -> PretrainedWeights:
    """The weights in a Hugging Face folder, of a model's name on the hub, in a run's folder, a GGUF file or a ckpt.pt.

    A run's are those of its best checkpoint, with LoRA's updates merged. Raises `UserError` if it is none of these, or
    damaged.
    """
    path = locate(name)
    if holds_run(path):
        run, params, _ = load_run(path, "best")
        model, params = merge_lora(run.model, params)
        load = partial(reuse_params, params, model.vocab_size)
        return PretrainedWeights(model, str(path / "tokenizer.json"), path, load)
    weights = open_weights(path)
    folder, tokenizer = folder_of(path), tokenizer_of(path, weights.config)
    return PretrainedWeights(weights.config, tokenizer, folder, lambda *args: load_params(weights, *args))


def resumed(config: Config, saved: Config, run_dir: Path) -> Config:
    """The config of a run that resumes after it started from pretrained weights, which may no longer be there.

    If their tokenizer is gone, the run's own copy of it is used.
    """
    before = saved.data.tokenizer
    if config.data.tokenizer in (DataConfig().tokenizer, before):
        tokenizer = before if before == "gpt2" or Path(before).exists() else str(run_dir / "tokenizer.json")
        config = replace(config, data=replace(config.data, tokenizer=tokenizer))
    return replace(config, model=_adopt(config.model, saved.model))


def _adopt(config: ModelConfig, checkpoint: ModelConfig) -> ModelConfig:
    """The checkpoint's architecture with the config's other fields: block_size, dropout, dtype, LoRA.

    Raises `UserError` if the config sets another architecture, or asks for more positions than the checkpoint has.
    """
    defaults, longest = ModelConfig(), checkpoint.block_size
    if config.block_size == defaults.block_size:
        config = replace(config, block_size=min(config.block_size, longest))
    too_long = f"is longer than this checkpoint's {longest} positions; pass --model.block_size {longest} or less"
    config.require(config.block_size <= longest, "block_size", too_long)
    inherited = {f.name: getattr(checkpoint, f.name) for f in fields(ModelConfig) if f.metadata["architecture"]}
    for name, value in inherited.items():
        fits = getattr(config, name) in (getattr(defaults, name), value)
        config.require(fits, name, f"is not what the checkpoint has ({value}); leave it out")
    return replace(config, **inherited)
