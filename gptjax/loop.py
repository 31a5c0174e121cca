"""The training loop: a run from its first step, or from its last checkpoint, to its report."""

import math
from collections.abc import Callable, Collection
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax import distributed, flops
from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, MeshConfig, ModelConfig, flat
from gptjax.data import batches
from gptjax.data.packing import PackedTokens
from gptjax.data.prepare import Dataset, load_dataset
from gptjax.data.token_files import Tokens
from gptjax.distributed import StopSignal
from gptjax.errors import UserError, first_line
from gptjax.files import write_atomically
from gptjax.progress import working
from gptjax.reporting import environment, report
from gptjax.reporting.advice import advice
from gptjax.reporting.metrics import Metrics
from gptjax.reporting.profiler import Profiler
from gptjax.reporting.report_page import write_page
from gptjax.resolve import resolve
from gptjax.run_dir import require_resumable, saved_config
from gptjax.sharding import batch_sharding, make_mesh, memory, require_memory
from gptjax.training import Steps, TrainState, compile_steps, state_bytes

MOST_SAMPLES = 5  # in a report, beside that of the best checkpoint
FIRST_BATCHES = 4  # in the evaluation of random weights, which predict no part of the split better than another


@dataclass
class Progress:
    """The state of a run outside of its arrays, saved with every checkpoint."""

    data: str  # the fingerprint of its tokens
    seconds: float = 0.0
    best_step: int = 0
    best_val_loss: float = math.inf
    evaluated_step: int | None = None  # the last one; None in checkpoints of version 0.1
    skipped: int = 0  # updates whose loss or gradient was not finite


class Run(NamedTuple):
    """The parts of a run that do not change from step to step."""

    config: Config
    folder: Path
    dataset: Dataset
    mesh: Mesh
    steps: Steps
    latest: Checkpoints
    best: Checkpoints


@runtime_checkable
class InitialWeights(Protocol):
    """The weights that a run starts from, as `gptjax.hub.init_from.PretrainedWeights` gives them."""

    def require_fit(self, dataset: Dataset, run_dir: Path, config: ModelConfig) -> None:
        """Raise `UserError` if the run's tokenizer or config does not fit the weights."""

    def copy_side_files(self, run_dir: Path) -> None:
        """Copy into the run what belongs to the weights, such as a chat template."""

    @property
    def load(self) -> Callable[[ModelConfig, Any, int], Any]:
        """A function that gives the parameters of a model, sharded as asked, from its config and a seed."""


def train(
    config: Config,
    run_dir: Path,
    resume: bool,
    weights: InitialWeights | None = None,
    sample: Callable[[Path, int], str] | None = None,
    from_step: int | None = None,
    named: Collection[str] = (),
) -> int:
    """Train, evaluate, save and report; return the exit code, 0 or 128 + the signal that stopped the run.

    A new run starts from `weights`, by default random ones. `sample` gives a text from a finished run's folder and the
    step of a checkpoint, for the report. A run resumes from its newest intact checkpoint, or from that of `from_step`;
    the config may differ from that checkpoint's as `run_dir.require_resumable` says of `named`.

    Raises:
        UserError: data, devices or the run to resume do not fit; the loss diverged; a checkpoint cannot be used.
    """
    saved = saved_config(run_dir, step=from_step) if resume else None
    dataset = distributed.after_first("data", lambda: load_dataset(config.data, config.model.block_size))
    if weights:
        weights.require_fit(dataset, run_dir, config.model)
    config, model, mesh = _fit_to_devices(fit_to_data(config, dataset, saved), dataset)
    if saved:
        require_resumable(saved, config, named)
    with ExitStack() as stack:
        latest, best = _checkpoints(run_dir, config, resume, stack)
        peak = _peak(mesh, model.dtype)  # before anything is compiled beside it
        # Compiled ahead, unless weights are loaded first.
        steps = compile_steps(replace(config, model=model), mesh, ahead=not resume and weights is None)
        run = Run(config, run_dir, dataset, mesh, steps, latest, best)
        stop = stack.enter_context(StopSignal(mesh))
        if resume:
            state, progress = _resume(run, from_step)
        else:
            state, progress = _start(run, weights), Progress(dataset.fingerprint())
        weights = None  # frees the parameters that it may hold
        if distributed.is_first():
            for name, text in ({"config.json": config.to_json()} | dataset.run_files()).items():
                write_atomically(run_dir / name, text)
        evaluated = progress.evaluated_step in (None, int(state.step))
        if int(state.step) >= config.train.max_steps and evaluated and (run_dir / "report.md").exists():
            print(f"{run_dir} is at its last step, {int(state.step):,}; to train on raise --train.max_steps")
            return 0
        return _train_and_report(run, state, progress, peak, stop, sample)


def evaluate(
    config: Config, run_dir: Path | None, weights: InitialWeights | None = None, from_step: int | None = None
) -> float:
    """Print and return the validation loss of a run's best parameters, or of those of `from_step`, or of `weights`.

    Nothing is written. Raises `UserError` if there are no parameters, or if data or devices do not fit.
    """
    if run_dir is None and weights is None:
        raise UserError("nothing to evaluate: name a run with --out_dir, or weights with --init_from")
    saved = saved_config(run_dir, step=from_step) if run_dir else None
    dataset = distributed.after_first("data", lambda: load_dataset(config.data, config.model.block_size))
    if weights:
        weights.require_fit(dataset, Path("eval_only"), config.model)
    config, model, mesh = _fit_to_devices(fit_to_data(config, dataset, saved), dataset)
    steps = compile_steps(replace(config, model=model), mesh)
    if weights:
        params, name = weights.load(config.model, steps.state.params, config.train.seed), f"{config.init_from}"
    if run_dir:
        kept = Checkpoints(run_dir / "checkpoints" / ("best" if from_step is None else "latest"), read_only=True)
        trees, _ = kept.restore(from_step, params=steps.state.params)
        params, name = trees["params"], f"{run_dir}, step {kept.step if from_step is None else from_step:,}"
    with working("evaluating"):
        loss = validation_loss(Run(config, Path(), dataset, mesh, steps, None, None), params)  # type: ignore[arg-type]
    assert loss is not None
    print(f"{name}: validation loss {loss:.4f}")
    return loss


def fit_to_data(config: Config, dataset: Dataset, saved: Config | None = None) -> Config:
    """The config with the vocabulary size of the data and, for a resumed run, the dtype that it was saved with.

    The vocabulary grows where conversations have special tokens that it lacks.

    Raises:
        UserError: the vocabulary is too small for the tokenizer, or the text too short for a block.
    """
    dataset.require(config.model.block_size, config.model.vocab_size)
    if config.model.lora_rank:
        config.model.require(config.init_from is not None, "lora_rank", "without --init_from trains random weights")
        gate_only = config.model.lora_layers == "gate" and config.model.activation != "swiglu"
        config.model.require(not gate_only, "lora_layers", "is no layer of this model: only SwiGLU has a gate")
    n_tokens, vocab_size = dataset.tokenizer.vocab_size, config.model.vocab_size
    if config.data.format == "chat":
        vocab_size = max(vocab_size, n_tokens)
    if 0 < vocab_size < n_tokens:
        raise UserError(f"model.vocab_size={vocab_size} is less than the tokenizer's {n_tokens}; leave it out")
    model = replace(config.model, vocab_size=vocab_size or n_tokens)
    if saved and model.dtype == "auto":
        model = replace(model, dtype=saved.model.dtype)
    return replace(config, model=model)


def _fit_to_devices(config: Config, dataset: Dataset) -> tuple[Config, ModelConfig, Mesh]:
    """The config with its dtype and mesh, the model without "auto", and the mesh."""
    model = resolve(config.model, jax.devices()[0], packed=config.data.format == "chat")
    config = replace(config, model=replace(config.model, dtype=model.dtype))
    distributed.require_same("config", {"data": dataset.fingerprint(), "jax": jax.__version__} | flat(config))
    n_bytes = state_bytes(config)
    mesh = make_mesh(config.mesh, config.train.micro_batch_size, n_bytes)
    require_memory(mesh, n_bytes, config.train.batch_size * config.model.block_size)
    config = replace(config, mesh=MeshConfig(**mesh.shape))  # a resumed run on this mesh is equal bit for bit
    return config, model, mesh


def _checkpoints(run_dir: Path, config: Config, resume: bool, stack: ExitStack) -> list[Checkpoints]:
    """The run's latest and best checkpoints, on a folder that all processes share."""
    run_dir.mkdir(parents=True, exist_ok=True)
    distributed.require_shared(run_dir)
    folder, options = run_dir / "checkpoints", config.train
    several = Checkpoints(folder / "latest", keep=options.keep_checkpoints, keep_every=options.keep_every)
    latest, best = [stack.enter_context(closing(each)) for each in (several, Checkpoints(folder / "best"))]
    distributed.require_same("checkpoints", {"resume": resume, "latest": latest.step, "best": best.step})
    if not resume:
        best.drop_after(-1)  # left by a run that was killed before it saved its state
    return [latest, best]


def _start(run: Run, weights: InitialWeights | None) -> TrainState:
    if weights is None:
        with working("drawing the initial weights"):
            return run.steps.init()
    weights.copy_side_files(run.folder)
    return run.steps.start(weights.load(run.config.model, run.steps.state.params, run.config.train.seed))


def _resume(run: Run, from_step: int | None) -> tuple[TrainState, Progress]:
    """The state of the newest intact checkpoint, or of `from_step`; later ones are set aside."""
    abstract, step = run.steps.state, _step_to_resume(run, from_step)
    shapes = {"params": abstract.params, "opt_state": abstract.opt_state}
    with working("loading the checkpoint"):
        trees, meta = run.latest.restore(step, from_step is None, **shapes)
    progress = Progress(**{name: value for name, value in meta.items() if name != "config"})
    if not run.dataset.matches(progress.data):
        raise UserError(
            f"cannot resume: the tokens of data.source={run.config.data.source} are not those that {run.folder} was "
            f"trained on; restore that text, or start a new run without --resume"
        )
    progress.data = max(progress.data, run.dataset.fingerprint(), key=len)  # version 0.1 saved a part of it
    run.latest.drop_after(step, "unused")
    run.best.drop_after(step, None if from_step is None else "unused")  # without a choice it is written again, alike
    if run.best.step != progress.best_step:  # the run was killed between the two saves
        if progress.best_step == step:
            progress.evaluated_step = step - 1  # so that this step is evaluated again
        progress.best_step, progress.best_val_loss = _best_so_far(run)
    return TrainState(jax.device_put(np.int32(step), abstract.step.sharding), **trees), progress


def _best_so_far(run: Run) -> tuple[int, float]:
    """The step and the validation loss of the saved best parameters; 0 and infinity if there are none."""
    try:
        meta = run.best.restore()[1] if run.best.step is not None else {}
    except UserError:  # damaged
        meta = {}
    return meta.get("best_step", 0), meta.get("best_val_loss", math.inf)


def _step_to_resume(run: Run, from_step: int | None) -> int:
    kept = run.latest.steps
    if from_step is not None:
        if from_step not in kept:
            steps = ", ".join(map(str, kept))
            raise UserError(f"{run.folder} has no checkpoint of step {from_step}: pass --resume with one of {steps}")
        return from_step
    step = run.latest.newest_intact()
    if step is None:
        raise UserError(
            f"all checkpoints in {run.latest.folder} are damaged: restore one from a copy, or start a new run from the "
            f"best parameters with --init_from {run.folder} and another --out_dir"
        )
    return step


def _train_and_report(
    run: Run,
    state: TrainState,
    progress: Progress,
    peak: float,
    stop: StopSignal,
    sample: Callable[[Path, int], str] | None,
) -> int:
    """The loop and, if the run was not stopped, its report; the exit code."""
    config, start = run.config, int(state.step)
    step_flops = flops.step_flops(config, run.steps.state.params)
    _introduce(run, start, step_flops, peak)
    token_flops = step_flops / (config.train.batch_size * config.model.block_size)
    with (
        environment.recorded(run.folder, start, config, progress.data),
        Metrics(run.folder, config, start, progress.seconds, token_flops, peak, partial(_place, run)) as metrics,
    ):
        metrics.skipped = progress.skipped
        step = _loop(run, state, progress, metrics, stop)
        stopped = bool(stop.agreed) and (step < config.train.max_steps or progress.evaluated_step != step)
        reports = distributed.is_first() and not stopped
        samples = _samples(run, sample, metrics) if sample and reports else {}
        if reports and (run.folder / "loss.png").is_file():
            metrics.picture(run.folder / "loss.png")
    if stopped:
        print(f"stopped at step {step:,} and saved; to continue: --resume --out_dir {run.folder}")
        return 128 + stop.agreed
    if reports:
        _report(run, progress, token_flops / peak, samples)
    return 0


def _loop(run: Run, state: TrainState, progress: Progress, metrics: Metrics, stop: StopSignal) -> int:
    """Train from `state` to the last step, or until the run is stopped or its patience ends; return the step."""
    options, step = run.config.train, int(state.step)
    finished = step >= options.max_steps
    if step == 0 or (
        progress.evaluated_step is not None and progress.evaluated_step < step and options.evaluates(step)
    ):
        finished |= _evaluate(run, state, progress, metrics, stop)  # of a run that was stopped while it evaluated
    with (
        closing(batches.prefetch(batch_maker(run), range(step, options.max_steps))) as stream,
        closing(Profiler(run.folder / "profile", options.profiled)) as profiler,
    ):
        while not (finished or stop.agree()):
            windows = next(stream)
            step += 1
            distributed.at_step(step)
            with profiler.step(step, state):
                state, step_metrics = run.steps.train(state, windows)
            profiler.after(step, state)
            metrics.add(step, step_metrics)
            finished = step == options.max_steps
            if options.evaluates(step):
                finished |= _evaluate(run, state, progress, metrics, stop)
            if step % options.save_interval == 0 and run.latest.step != step:
                _save(run, state, progress, metrics)
    metrics.flush(last=True)
    if run.latest.step != step:
        _save(run, state, progress, metrics)
    run.latest.wait()
    run.best.wait()
    return step


def _evaluate(run: Run, state: TrainState, progress: Progress, metrics: Metrics, stop: StopSignal) -> bool:
    """Validate, save the best parameters so far and redraw loss.png; return whether the run's patience has ended.

    A run that is asked to stop while it evaluates saves at once, and evaluates this step when it resumes.
    """
    metrics.flush()
    with metrics.pause("evaluating"):
        step, options = metrics.step, run.config.train
        random_weights = step == 0 and run.config.init_from is None
        few = min(FIRST_BATCHES, options.eval_batches or FIRST_BATCHES)
        val_loss = validation_loss(run, state.params, few if random_weights else None, stop)
    if val_loss is None:
        return True
    progress.evaluated_step = step
    metrics.row(val_loss)
    if better := val_loss < progress.best_val_loss:
        progress.best_step, progress.best_val_loss = step, val_loss
        if run.latest.step is None and step > 0:  # so best parameters without any state are a run cut short
            _save(run, state, progress, metrics)
            with metrics.pause("saving"):
                run.latest.wait()
    with metrics.pause("drawing"):
        if better:
            run.best.save(step, _meta(run, progress), params=state.params)
        metrics.print(f"step {step:,}: validation loss {val_loss:.4f}" + (", the best so far" if better else ""))
        if distributed.is_first() and step:
            try:
                report.plot_losses(run.folder / "metrics.csv", run.folder / "loss.png", title=run.folder.name)
            except Exception as error:  # which must not stop the run
                metrics.print(f"note: loss.png was not drawn: {first_line(error)}")
    return bool(options.patience) and step - progress.best_step >= options.patience * options.eval_interval


def _save(run: Run, state: TrainState, progress: Progress, metrics: Metrics) -> None:
    metrics.flush()
    with metrics.pause("saving"):
        progress.seconds, progress.skipped = metrics.seconds, metrics.skipped
        run.latest.save(metrics.step, _meta(run, progress), params=state.params, opt_state=state.opt_state)


def _meta(run: Run, progress: Progress) -> dict[str, Any]:
    return asdict(progress) | {"config": asdict(run.config)}


def validation_loss(
    run: Run, params: Any, n_batches: int | None = None, stop: StopSignal | None = None
) -> float | None:
    """The mean nats per token of `n_batches` batches spread evenly over the validation split, by default eval_batches.

    With 0 the split is evaluated whole, each token once. None if `stop` was asked for between two batches.
    """
    tokens, options, block_size = run.dataset.val, run.config.train, run.config.model.block_size
    rows, n_batches = options.micro_batch_size, options.eval_batches if n_batches is None else n_batches
    starts = batches.sequential_starts(len(tokens), block_size)
    if 0 < n_batches * options.batch_size < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, n_batches * options.batch_size).astype(int)]
    starts = np.append(starts, np.full(-len(starts) % rows, len(tokens)))  # windows past the end have no targets

    def put(i: int) -> jax.Array:
        return _put_windows(run, tokens, starts[None, i * rows : (i + 1) * rows])

    sums = []
    with closing(batches.prefetch(put, range(len(starts) // rows))) as stream:
        for windows in stream:
            sums.append(run.steps.evaluate(params, windows))
            if stop and stop.agree():
                return None
    nats, n_targets = np.array(jax.device_get(sums), np.float64).sum(axis=0)
    return float(nats / n_targets)


def batch_maker(run: Run) -> Callable[[int], jax.Array]:
    """The function from a step to its training batch [A, B, W] on the mesh."""

    def make(step: int) -> jax.Array:
        starts_B = batch_starts(run.config, len(run.dataset.train), step)
        return _put_windows(run, run.dataset.train, starts_B.reshape(run.config.train.accumulate, -1))

    return make


def batch_starts(config: Config, n_tokens: int, step: int) -> np.ndarray:
    """Where in the training split the windows of the batch begin that follows step `step`."""
    return batches.starts(
        n_tokens,
        block_size=config.model.block_size,
        batch_size=config.train.batch_size,
        seed=config.train.seed if config.data.seed is None else config.data.seed,
        step=step,
        order="epoch" if config.data.format == "chat" else config.data.order,
    )


def _put_windows(run: Run, tokens: Tokens, starts_AB: np.ndarray) -> jax.Array:
    """The windows at these starts on the mesh; each process reads, all at once, the rows of its own devices.

    With 8 rows over 4 devices, of which this process has the last 2, it reads rows 4 to 7, and its first device gets
    `windows_ABW[:, 0:2]`.
    """
    model, split = run.config.model, batch_sharding(run.mesh)
    shape = (*starts_AB.shape, model.block_size + 1)

    def rows(index: Any) -> np.ndarray:
        return np.arange(shape[1])[index[1]]

    own_B = np.unique(np.concatenate([rows(i) for i in split.addressable_devices_indices_map(shape).values()]))
    largest = None if isinstance(tokens, PackedTokens) else model.vocab_size
    windows = batches.windows(tokens, starts_AB[:, own_B].ravel(), model.block_size, largest)
    windows_ABW = windows.reshape(len(starts_AB), len(own_B), -1)
    return jax.make_array_from_callback(shape, split, lambda i: windows_ABW[:, np.searchsorted(own_B, rows(i))])


def _peak(mesh: Mesh, dtype: str) -> float:
    """The devices' peak FLOP/s, nan where it is unknown; that of CPUs is measured."""
    devices = mesh.devices.flatten().tolist()
    if devices[0].platform == "cpu":
        local = [device for device in devices if device.process_index == distributed.index()]
        return flops.measured_matmul_peak(local, dtype, seconds=0.1) * len(devices) / len(local)
    known = flops.device_peak(devices[0].device_kind)
    return known.flops * len(devices) if known else math.nan


def _introduce(run: Run, step: int, step_flops: int, peak: float) -> None:
    """Print what is about to run."""
    dataset, devices, params = run.dataset, run.mesh.devices.flatten().tolist(), run.steps.state.params
    n_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    lora = [leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "lora_" in path[-1].key]
    trained = f" ({sum(lora):,} of them trained)" if lora else ""
    print(f"run:     {run.folder}" + (f", resumed at step {step:,}" if step else ""))
    print(
        f"model:   {n_params:,} parameters{trained}, {step_flops / 1e12:.3g} TFLOP a step, "
        f"activations in {run.config.model.dtype}"
    )
    print(f"data:    {dataset.folder}: {dataset.summary()}, vocabulary {dataset.tokenizer.vocab_size:,}")
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items() if size > 1) or "one device"
    peak_text = "" if math.isnan(peak) else f", peak {peak / 1e12:.3g} TFLOP/s"
    hosts = f" of {distributed.count()} processes" if distributed.count() > 1 else ""
    print(f"devices: {len(devices)} x {devices[0].device_kind}{hosts} ({mesh}){peak_text}", flush=True)


def _place(run: Run, step: int) -> str:
    """A step and where its batch is in the data, for notes."""
    starts = batch_starts(run.config, len(run.dataset.train), step - 1)
    packed = isinstance(run.dataset.train, PackedTokens)
    some = starts[:3] // run.config.model.block_size if packed else starts[:3]
    text = ", ".join(f"{start:,}" for start in some) + (", ..." if len(starts) > 3 else "")
    return f"step {step:,} (windows of the training split{', numbers' if packed else ' from tokens'} {text})"


def _report(run: Run, progress: Progress, mfu_per_token_rate: float, samples: dict[int, str]) -> None:
    """Write report.html and report.md."""
    try:
        metrics = report.read_metrics(run.folder / "metrics.csv")
    except OSError as error:
        print(f"note: no report, as metrics.csv cannot be read: {error}")
        return
    mfu = report.median_rate(metrics) * mfu_per_token_rate
    local = run.mesh.local_devices
    figures = report.Figures(
        metrics,
        run.config,
        characters_per_token=run.dataset.characters_per_token(),
        mfu=None if math.isnan(mfu) else mfu,
        peak_memory=report.peak_memory_bytes(local),
        memory=sum(map(memory, local)),
        skipped=progress.skipped,
    )
    facts, next_steps = report.facts(figures), advice(figures)
    try:
        write_page(run.folder, figures, facts, next_steps, samples)
    except Exception as error:  # which must not stop the run
        print(f"note: report.html was not written: {first_line(error)}")
    text = report.run_report(run.folder.name, facts, next_steps, samples.get(progress.best_step))
    write_atomically(run.folder / "report.md", text)
    print(f"\n{text}\npage:   {run.folder / 'report.html'}\nsample: gptjax sample --run {run.folder}")


def _samples(run: Run, sample: Callable[[Path, int], str], metrics: Metrics) -> dict[int, str]:
    """The texts of the best checkpoint and of at most `MOST_SAMPLES` others, spread evenly, by their steps.

    There are none where one device does not hold the parameters with room to spare.
    """
    n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.steps.state.params))
    if n_bytes > memory(run.mesh.local_devices[0]) / 2:
        return {}
    kept, texts = run.latest.steps, {}
    spread = {kept[i] for i in np.linspace(0, len(kept) - 1, min(len(kept), MOST_SAMPLES)).astype(int)}
    with metrics.pause("sampling"):
        for step in sorted(spread if run.best.step is None else spread | {run.best.step}):
            try:
                texts[step] = sample(run.folder, step)
            except UserError as error:  # a damaged checkpoint costs the report its sample alone
                metrics.print(f"note: no sample of step {step:,} in the report: {error}")
    metrics.samples(texts)
    return texts
