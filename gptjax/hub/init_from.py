"""Where a run's first weights come from when it does not draw them: `--init_from`."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptjax.config import Config, DataConfig, ModelConfig
from gptjax.data.prepare import Dataset
from gptjax.errors import UserError
from gptjax.hub.weights import (
    SIDE_FILES,
    adopt,
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
    """Weights to start from, looked at and not yet read."""

    config: ModelConfig
    tokenizer: str  # as data.tokenizer names it
    folder: Path
    load: Callable[[ModelConfig, Any, int], Any]  # config, abstract parameters, seed of what is new -> parameters

    def adapt(self, config: Config) -> Config:
        """The config with this architecture, and with this tokenizer unless it names one.

        Raises:
            UserError: it sets something that the weights do not have.
        """
        named = config.data.tokenizer != DataConfig().tokenizer
        data = config.data if named else replace(config.data, tokenizer=self.tokenizer)
        return replace(config, model=adopt(config.model, self.config), data=data)

    def require_fit(self, dataset: Dataset, run_dir: Path) -> None:
        """Raise `UserError` unless the tokens are of the weights' own tokenizer, and the run has its own folder."""
        own = Tokenizer.from_name_or_path(self.tokenizer)
        if own.vocabulary() != dataset.tokenizer.vocabulary():
            raise UserError(
                f"{dataset.folder} was made with another tokenizer than the weights of {self.folder}: "
                f"pass --data.tokenizer {self.tokenizer}, and a --data.source of text"
            )
        if run_dir.resolve() == self.folder.resolve():
            raise UserError(f"out_dir={run_dir} is where the weights to start from are: name another --out_dir")

    def copy_side_files(self, run_dir: Path) -> None:
        """Keep the chat template, the stop tokens and the like with the run, which then needs nothing else."""
        for name in SIDE_FILES:
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, run_dir / name)


def resumed(config: Config, saved: Config, run_dir: Path) -> Config:
    """The config of a run that goes on and started from weights that may be gone: it has a copy."""
    before = saved.data.tokenizer
    if config.data.tokenizer in (DataConfig().tokenizer, before):
        tokenizer = before if before == "gpt2" or Path(before).exists() else str(run_dir / "tokenizer.json")
        config = replace(config, data=replace(config.data, tokenizer=tokenizer))
    return replace(config, model=adopt(config.model, saved.model))


def open_pretrained(name: str) -> PretrainedWeights:
    """A Hugging Face folder or the name of a model there, a run's folder (its best checkpoint), or nanoGPT's ckpt.pt.

    Raises:
        UserError: it is none of these, or damaged.
    """
    path = locate(name)
    if holds_run(path):
        return _open_run(path)
    weights = open_weights(path)
    folder = path if path.is_dir() else path.parent
    return PretrainedWeights(
        weights.config, tokenizer_of(path, weights.config), folder, lambda *arguments: load_params(weights, *arguments)
    )


def _open_run(path: Path) -> PretrainedWeights:
    run, params, _ = load_run(path, "best")
    checkpoint, params = merge_lora(run.model, params)

    return PretrainedWeights(
        checkpoint, str(path / "tokenizer.json"), path, lambda *arguments: reuse_params(params, *arguments)
    )
