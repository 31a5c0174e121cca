"""A profile of some steps of a run: a trace that TensorBoard (with the plugin "profile") and Perfetto open."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Records the steps `first` to `last` with jax.profiler, each under its number, into a folder.

    Without steps it does nothing. Where the folder holds plugins/profile/TIME/, the trace is in there.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None) -> None:
        self._folder, self._first, self._last = folder, *(steps or (0, 0))
        self._recording = False

    @contextlib.contextmanager
    def step(self, number: int, state: Any) -> Iterator[None]:
        """The block dispatches step `number`, which begins when `state` is computed."""
        if number == self._first:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python would fill most of the file
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._recording = True
        if not self._recording:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, state: Any) -> None:
        """End the recording if this step was its last; `state` is the one after it."""
        if self._recording and number >= self._last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """End a recording that is under way, and write it."""
        if self._recording:
            jax.profiler.stop_trace()
            self._recording = False
