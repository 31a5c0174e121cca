"""What to do next after a run, from its own figures."""

import math

import numpy as np

from gptjax.reporting.metrics import Spikes
from gptjax.reporting.report import Figures, measured, overfitting_onset, stepping_share


def advice(run: Figures) -> list[str]:
    """A sentence or two for each rule whose condition the figures meet, the most important first."""
    rules = (_unsteady, _overfitting, _still_falling, _lowest_rate, _clipping, _pauses, _utilization, _uneven_speed)
    return [text for rule in rules if (text := rule(run))]


def _unsteady(run: Figures) -> str:
    spikes, options, (steps, train) = Spikes(), run.config.optimizer, measured(run.metrics, "train_loss")
    losses = np.clip(train, -1e38, 1e38).tolist()  # of a float32
    jumps = [f"{step:,.0f}" for step, loss in zip(steps, losses, strict=True) if spikes.jumps(loss)]
    updates = f"{run.skipped:,} update{'s' * (run.skipped != 1)}"
    found = [f"{updates} with a loss or gradient that is not finite had to be skipped"] * bool(run.skipped)
    if jumps:
        found.append(f"the training loss jumped at step {', '.join(jumps[:5])}" + ", ..." * (len(jumps) > 5))
    if not found:
        return ""
    rates = f"optimizer.learning_rate (now {options.learning_rate:g})"
    if options.matrix_optimizer == "muon":
        rates += f" and optimizer.muon_learning_rate (now {options.muon_learning_rate:g})"
    text = f"{', and '.join(found)}. Lower {rates}, or warm up over more than {options.warmup_steps:,} steps."
    return text[0].upper() + text[1:]


def _overfitting(run: Figures) -> str:
    steps, val = measured(run.metrics, "val_loss")
    onset = overfitting_onset(steps, val)
    if onset is None:
        return ""
    return (
        f"Overfitting: validation loss was best at step {onset:,} and has risen {val[-1] / val.min() - 1:.1%} since. "
        "Use the checkpoint of the best step. More data, more dropout or a smaller model would help; "
        "train.patience ends such a run early."
    )


def _still_falling(run: Figures) -> str:
    _, val = measured(run.metrics, "val_loss")
    if len(val) < 2 or val[-1] > val.min():
        return ""
    return f"Validation loss was lowest at the very end, {val[-1]:.4f}: a longer run may do better (train.max_steps)."


def _lowest_rate(run: Figures) -> str:
    (steps, rates), options = measured(run.metrics, "learning_rate"), run.config.optimizer
    higher = np.flatnonzero(rates > options.min_learning_rate + 1e-6 * options.learning_rate)
    if len(higher) == 0 or steps[higher[-1]] > 0.9 * steps[-1]:
        return ""
    return (
        f"The learning rate was at its minimum, {options.min_learning_rate:g}, for the last "
        f"{1 - steps[higher[-1]] / steps[-1]:.0%} of the steps. A run whose optimizer.decay_steps is its last step "
        "keeps a higher rate for longer."
    )


def _clipping(run: Figures) -> str:
    (steps, norms), options = measured(run.metrics, "grad_norm"), run.config.optimizer
    norms = norms[steps > options.warmup_steps]
    share = float(np.mean(norms > options.grad_clip)) if len(norms) else 0.0
    if options.grad_clip == 0 or share <= 0.5:
        return ""
    return (
        f"The gradient norm was above optimizer.grad_clip={options.grad_clip:g} at {share:.0%} of the logged steps "
        f"after the warm-up; its median is {np.median(norms):.2g}. To clip only outliers, raise grad_clip to about "
        f"{2 * np.median(norms):.1g}; if the loss is unsteady too, lower the learning rate instead."
    )


def _pauses(run: Figures) -> str:
    share, n = stepping_share(run.metrics), len(measured(run.metrics, "val_loss")[0])
    options = run.config.train
    if math.isnan(share) or share > 0.8:
        return ""
    batches = "the whole split" if options.eval_batches == 0 else f"{options.eval_batches:,} batches"
    return (
        f"{1 - share:.0%} of the time was not spent in training steps but in {n:,} evaluations of {batches}, in "
        f"saving, drawing and compiling. Raise train.eval_interval (now {options.eval_interval:,}) and "
        f"train.save_interval (now {options.save_interval:,}), or evaluate fewer batches (train.eval_batches)."
    )


def _utilization(run: Figures) -> str:
    if run.mfu is None or run.mfu >= 0.3:
        return ""
    config, mesh, accelerated = run.config, run.config.mesh, math.isfinite(run.memory)
    rows = config.train.batch_size / config.train.accumulate / abs(mesh.data * mesh.fsdp or 1)
    tokens = round(rows * config.model.block_size)
    causes = []
    if config.model.n_embd < 512:
        causes.append(f"its matrices are only {config.model.n_embd} wide (model.n_embd)")
    if accelerated and tokens < 4096:
        causes.append(f"a device gets only {tokens:,} tokens at a time (train.batch_size x block_size / accumulate)")
    if accelerated and config.model.dtype == "float32":
        causes.append("activations are in float32 (model.dtype)")
    text = f"Model FLOPs utilization is low, {run.mfu:.1%}"
    text += ": " + ", and ".join(causes) + "." if causes else "; the run's figures do not show why."
    if accelerated and run.peak_memory is not None and run.peak_memory < 0.5 * run.memory:
        text += f" At most {run.peak_memory / run.memory:.0%} of the devices' memory was in use: a larger batch fits."
    return text + " gptjax plan prints the highest speed that the hardware allows."


def _uneven_speed(run: Figures) -> str:
    _, rates = measured(run.metrics, "tokens_per_second")
    if len(rates) < 20:
        return ""
    slow, median = np.quantile(rates, 0.1), float(np.median(rates))
    if slow > 0.7 * median:
        return ""
    return (
        f"Speed was uneven: a tenth of the logged intervals ran below {slow:,.0f} tokens/s, and the median is "
        f"{median:,.0f}. Other programs on the machine or slow storage of the data can be the reason."
    )
