"""Where a run's first weights come from when it does not draw them: `--init_from`."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptjax.config import Config, DataConfig, ModelConfig
from gptjax.pretrained import SIDE_FILES, adopt, load_params, locate, merge_lora, open_weights, reuse_params
from gptjax.run import holds_run, load_run


@dataclass(frozen=True)
class Origin:
    """Weights to start from, looked at and not yet read."""

    config: ModelConfig
    tokenizer: str | None  # as data.tokenizer names it; None: the corpus's own, as of nanoGPT's ckpt.pt of characters
    folder: Path
    load: Callable[[ModelConfig, Any, int], Any]  # config, abstract parameters, seed of what is new -> parameters

    def adapt(self, config: Config) -> Config:
        """The config with this architecture, and with this tokenizer unless it names one.

        Raises:
            UserError: it sets something that the weights do not have.
        """
        named = config.data.tokenizer != DataConfig().tokenizer
        tokenizer = config.data.tokenizer if named else self.tokenizer or config.data.tokenizer
        data = replace(config.data, tokenizer=tokenizer)
        return replace(config, model=adopt(config.model, self.config), data=data)

    @staticmethod
    def of_run(saved: Config) -> "Origin":
        """What a run that is resumed once started from: its config names everything, its checkpoint has the weights."""
        return Origin(saved.model, saved.data.tokenizer, Path(), lambda *arguments: None)

    def copy_side_files(self, run_dir: Path) -> None:
        """Keep the chat template, the stop tokens and the like with the run, which then needs nothing else."""
        for name in SIDE_FILES:
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, run_dir / name)


def open_origin(name: str) -> Origin:
    """A Hugging Face folder or the name of a model there, a run's folder (its best checkpoint), or nanoGPT's ckpt.pt.

    Raises:
        UserError: it is none of these, or damaged.
    """
    path = locate(name)
    if holds_run(path):
        return _open_run(path)
    weights = open_weights(path)
    folder = path if path.is_dir() else path.parent
    tokenizer: str | None = str(folder)
    if not path.is_dir() and not (folder / "tokenizer.json").exists():
        tokenizer = "gpt2" if weights.config.vocab_size in (50257, 50304) else None  # nanoGPT pads to the latter
    return Origin(weights.config, tokenizer, folder, lambda *arguments: load_params(weights, *arguments))


def _open_run(path: Path) -> Origin:
    run, params, _ = load_run(path, "best")
    checkpoint, params = merge_lora(run.model, params)

    return Origin(checkpoint, str(path / "tokenizer.json"), path, lambda *arguments: reuse_params(params, *arguments))
