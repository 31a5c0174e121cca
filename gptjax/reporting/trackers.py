"""Where a run's curves, samples and loss picture go beside metrics.csv: TensorBoard, and Weights & Biases if asked."""

import importlib.util
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptjax.config import Config
from gptjax.errors import UserError, first_line
from gptjax.files import write_atomically


def require_trackers(config: Config) -> None:
    """Raise `UserError` if the run asks for a package that is not installed."""
    missing = config.train.wandb and importlib.util.find_spec("wandb") is None
    config.train.require(not missing, "wandb", "needs the package wandb: pip install 'gptjax[wandb]'")


class TensorBoard:
    """TensorBoard's event file, written at once: a writing thread that dies on a full disk would block the run."""

    def __init__(self, folder: Path, start: int) -> None:
        hide = "torch" not in sys.modules  # which tensorboardX would import, for seconds, without need
        if hide:
            sys.modules["torch"] = None  # type: ignore[assignment]
        try:
            from tensorboardX import event_file_writer, proto, summary
        finally:
            if hide:
                del sys.modules["torch"]
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = event_file_writer.EventsWriter(str(folder / "events"))
        self._event, self._summary, self._make = proto.event_pb2.Event, proto.summary_pb2.Summary, summary
        if start:  # TensorBoard drops what the run before wrote after this step
            session = proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START)
            self._write(start + 1, session_log=session)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the scalars of a step, by their names."""
        for name, value in values.items():
            self._write(step, summary=self._make.scalar(name, value))
        self._writer.flush()

    def picture(self, step: int, png: Path) -> None:
        """Write the picture of the losses at this step."""
        image = self._summary.Image(colorspace=4, encoded_image_string=png.read_bytes())
        self._write(step, summary=self._summary(value=[self._summary.Value(tag="loss", image=image)]))
        self._writer.flush()

    def samples(self, texts: Mapping[int, str]) -> None:
        """Write the samples of a run, by the steps of their checkpoints."""
        for step, text in sorted(texts.items()):
            indented = "\n".join(f"    {line}" for line in text.splitlines())  # as code in Markdown, which keeps lines
            self._write(step, summary=self._make.text("sample", indented))
        self._writer.flush()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        """Write what is not written yet."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run continues; its id is in wandb/id of the run's folder.

    WANDB_MODE=offline keeps it in that folder, and `wandb sync` uploads it later.
    """

    def __init__(self, run_dir: Path, config: Config) -> None:
        """Raises `UserError` if the run cannot begin, for example without a login."""
        import wandb

        self._wandb, file = wandb, run_dir / "wandb" / "id"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, secrets.token_hex(4))
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
        try:
            self._run = wandb.init(
                project=config.train.wandb,
                name=run_dir.name,
                id=file.read_text().strip(),
                resume="allow",
                dir=run_dir,
                config=asdict(config),
                settings=settings,
            )
        except (wandb.Error, OSError) as error:
            reason = f"cannot begin: {first_line(error)}; run `wandb login`, or set WANDB_MODE=offline"
            raise UserError(f"train.wandb={config.train.wandb!r} {reason}") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # so that a resumed run may write steps again
        print(f"wandb:   {Path(self._run.dir).parent if self._run.offline else self._run.url}", flush=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the scalars of a step, by their names."""
        self._run.log({"step": step, **values})

    def picture(self, step: int, png: Path) -> None:
        """Write the picture of the losses at this step."""
        self._run.log({"step": step, "loss": self._wandb.Image(str(png))})

    def samples(self, texts: Mapping[int, str]) -> None:
        """Write the samples of a run, by the steps of their checkpoints."""
        table = self._wandb.Table(["step", "sample"], [[step, text] for step, text in sorted(texts.items())])
        self._run.log({"samples": table})

    def close(self) -> None:
        """Write what is not written yet."""
        self._run.finish()
