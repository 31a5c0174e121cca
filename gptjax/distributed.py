"""Several processes, on as many hosts, as one run: how they join, what they agree on, and who is named if one is lost.

Each process beats into the key-value store of JAX's coordination service, which process 0 keeps; process 0 judges, and
all end with the same line. Without other processes every function here does the obvious thing alone.
"""

import contextlib
import ctypes
import math
import os
import re
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state  # what `jax.distributed` keeps, its key-value store among it
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.errors import UserError, exit_code_and_message

BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0  # without a beat: the process is dead or stopped, or its network is
BEHIND_SECONDS = 50.0  # without a step that others have begun: it lives, and hangs
FIRST_SECONDS = 1800.0  # the same in its first steps, which one process may have to compile and another finds compiled
FIRST_STEPS = 3
JOIN_SECONDS = 300
WAIT_MS = 24 * 3600 * 1000  # for process 0 to prepare data, say; if it dies meanwhile the watch ends the wait
LOST_PEER = re.compile("gloo|nccl|connection|socket|peer|unavailable|deadline|heartbeat|barrier|coordination", re.I)
CODE = 1  # the exit code of a process whose peer is lost


def index() -> int:
    """This process's number, from 0; known before any device is."""
    return global_state.process_id if global_state.client else 0


def count() -> int:
    return global_state.num_processes if global_state.client else 1


def is_first() -> bool:
    """Whether this is process 0, which prints and writes what is written once."""
    return index() == 0


@contextlib.contextmanager
def joined(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Iterator[None]:
    """Inside, this process is one of several, if flags or a cluster that JAX knows say so; only process 0 prints.

    JAX knows Cloud TPU, SLURM, Open MPI and Kubernetes. An error in one process, or its death, ends all of them with
    one line that names it and an exit code other than 0.

    Raises:
        UserError: the processes cannot find each other.
    """
    if not _connect(coordinator, num_processes, process_id):
        yield
        return
    watch = _Watch()
    _current.append(watch)
    try:
        with contextlib.ExitStack() as stack:
            if not is_first():
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield
    except BaseException as error:
        watch.leave(error)
    watch.finish()


def from_first(what: str, function: Callable[[], str]) -> str:
    """What `function` returns in process 0, in all of them; the others do not run it. `what` is used once in a run."""
    if count() == 1:
        return function()
    if is_first():
        value = function()
        _store().key_value_set(f"gptjax/first/{what}", value)
        return value
    return str(_store().blocking_key_value_get(f"gptjax/first/{what}", WAIT_MS))


def require_same(what: str, values: dict[str, Any]) -> None:
    """Raise `UserError`, naming the first that differs, unless all processes have the values of process 0."""
    ours = "\n".join(f"{name}={value}" for name, value in values.items())
    theirs = from_first(what, lambda: ours)
    different = [pair for pair in zip(ours.split("\n"), theirs.split("\n"), strict=False) if pair[0] != pair[1]]
    if different:
        raise UserError(f"{different[0][0]} here, but {different[0][1]} in process 0: start all processes alike")


def require_shared(folder: Path) -> None:
    """Raise `UserError` unless the folder that process 0 sees is the one that this process sees."""
    if count() == 1:
        return
    token = folder / from_first("token", lambda: _new_file(folder))
    end = time.monotonic() + 90  # network file systems take their time to show a new file
    while not token.exists():
        if time.monotonic() > end:
            raise UserError(f"{folder} is not the folder that process 0 writes: put --out_dir on storage of all hosts")
        time.sleep(0.2)
    _store().wait_at_barrier("gptjax/shared", WAIT_MS)
    if is_first():
        token.unlink()


def _new_file(folder: Path) -> str:
    descriptor, path = tempfile.mkstemp(prefix=".shared-", dir=folder)
    os.close(descriptor)
    return Path(path).name


def after_first(what: str, function: Callable[[], Any]) -> Any:
    """`function` in process 0, and then in the others, which find what it left where storage is shared."""
    result = function() if is_first() else None
    from_first(what, lambda: "done")
    return result if is_first() else function()


_current: "list[_Watch]" = []


def at_step(step: int) -> None:
    """Note that this process begins a step: one that stays behind the others is then found."""
    for watch in _current:
        watch.step = step


def _connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> bool:
    if num_processes == 1:
        return False
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM; loop.py handles that
    flags = (coordinator, num_processes, process_id)
    try:
        jax.distributed.initialize(*flags, initialization_timeout=JOIN_SECONDS)
    except ValueError as error:
        several = any(os.environ.get(name, "1") != "1" for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
        if flags == (None, None, None) and not several and "JAX_COORDINATOR_ADDRESS" not in os.environ:
            return False  # no cluster
        way_out = "pass --coordinator HOST:PORT, --num_processes and --process_id; to train alone --num_processes 1"
        raise UserError(f"these processes do not know each other ({error}): {way_out}") from error
    except Exception as error:
        reason = str(error).split("\n")[0]
        address = global_state.coordinator_address
        there = f": is process 0 running, and does its host take connections at {address}?" if address else "."
        raise UserError(
            f"the processes cannot find each other ({reason}){there} To train on this host alone pass --num_processes 1"
        ) from error
    return global_state.num_processes > 1


def _store() -> Any:
    return global_state.client


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]


def _name(process: int) -> str:
    host = dict(_store().key_value_dir_get("gptjax/host/")).get(f"gptjax/host/{process}", "unknown host")
    return f"process {process} ({host})"


@dataclass
class _Seen:
    """What process 0 last saw of another one."""

    beat: str = ""
    at: float = 0.0  # when the beat changed, by this process's clock
    step: int = 0
    step_at: float = 0.0
    n_steps: int = 0  # that were seen to begin


class _Watch:
    """A thread that tells the others that this process lives, and ends it when one of them does not."""

    def __init__(self) -> None:
        self.step, self._beats, self._over = 0, 0, threading.Event()
        _store().key_value_set(f"gptjax/host/{index()}", socket.gethostname())
        now = time.monotonic()
        self._seen = {process: _Seen(at=now, step_at=now) for process in range(count())} if is_first() else {}
        self._coordinator = f"process 0 ({global_state.coordinator_address})"  # known without asking it
        self._on_abort()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """This process ends well: wait for the others, still watching, then stop."""
        with contextlib.suppress(Exception):
            _store().wait_at_barrier("gptjax/end", WAIT_MS)
        self._stop("done")
        _current.remove(self)
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)

    def _stop(self, last_words: str) -> None:
        """No beat comes after these words."""
        self._over.set()
        self._thread.join(SILENT_SECONDS)
        self._tell(last_words)

    def leave(self, error: BaseException) -> NoReturn:
        """End this process after an error, and tell the others, unless it is that another one was lost."""
        known = exit_code_and_message(error)
        code, message = known or (CODE, f"{type(error).__name__}: {_first_line(error)}")
        if known is None:
            traceback.print_exception(error)
            if LOST_PEER.search(message):  # the watch ends this process sooner, with the name of the one that is lost
                time.sleep(SILENT_SECONDS + BEHIND_SECONDS)
        self._stop(f"failed {message}")
        if is_first():
            self._tell_all(f"{_name(0)}: {message}")
        self._end(f"{_name(index())}: {message}", code)

    def _run(self) -> None:
        """Calls to the store run in a thread of their own: they hang when process 0 does."""
        with ThreadPoolExecutor(1) as calls:
            while not self._over.wait(BEAT_SECONDS):
                try:
                    verdict = calls.submit(self._beat).result(SILENT_SECONDS)
                except TimeoutError:
                    verdict = f"{self._coordinator} has not answered for {SILENT_SECONDS:.0f} s: it died or was stopped"
                except Exception as error:
                    verdict = f"{self._coordinator} is gone: {_first_line(error)}"
                if verdict and not self._over.is_set():
                    self._end(f"{verdict}; all processes stop, --resume goes on from the last checkpoint", CODE)

    def _beat(self) -> str:
        """Tell that this process lives; what is said of one that does not, or nothing."""
        self._beats += 1
        self._tell(f"{self._beats} {self.step}")
        if not is_first():
            return "".join(value for _, value in _store().key_value_dir_get("gptjax/verdict/"))
        if verdict := self._judge():
            self._tell_all(verdict)
        return verdict

    def _judge(self) -> str:
        now = time.monotonic()
        for key, beat in _store().key_value_dir_get("gptjax/beat/"):
            seen = self._seen[int(key.rpartition("/")[2])]
            if beat != seen.beat:
                seen.beat, seen.at = beat, now
            if beat[0].isdigit() and (step := int(beat.split()[1])) != seen.step:
                seen.step, seen.step_at, seen.n_steps = step, now, seen.n_steps + 1
        front = max(seen.step for seen in self._seen.values())
        for process, seen in self._seen.items():
            if seen.beat == "done":
                continue
            if seen.beat.startswith("failed "):
                return f"{_name(process)}: {seen.beat.removeprefix('failed ')}"
            if now - seen.at > SILENT_SECONDS:
                return f"{_name(process)} has not answered for {SILENT_SECONDS:.0f} s: it died, or was stopped"
            ahead = [other.step_at for other in self._seen.values() if other.step > seen.step]
            limit = FIRST_SECONDS if seen.n_steps < FIRST_STEPS else BEHIND_SECONDS
            if ahead and now - min(ahead) > limit:
                return f"{_name(process)} hangs in step {seen.step} while the others wait for it in step {front}"
        return ""

    def _tell(self, beat: str) -> None:
        with contextlib.suppress(Exception):  # at the end process 0 may be gone already
            _store().key_value_set(f"gptjax/beat/{index()}", beat, allow_overwrite=True)

    def _tell_all(self, verdict: str) -> None:
        with contextlib.suppress(Exception):
            _store().key_value_set("gptjax/verdict/of", verdict, allow_overwrite=True)

    def _end(self, message: str, code: int) -> NoReturn:
        """At once: threads of JAX's would wait for the others at a normal exit."""
        os.write(2, f"error: {' '.join(message.split())}\n".encode())
        if is_first():
            time.sleep(4 * BEAT_SECONDS + 1)  # the others read the verdict here
        os._exit(code)

    def _on_abort(self) -> None:
        """JAX aborts a process whose coordinator is gone, in a thread of its own: say whom it lost, and end in order.

        A signal handler in C, since Python's would wait for the main thread, which waits for a device.
        """
        lost = (
            f"error: process {index()} ends: JAX aborted it, as it does when {self._coordinator} is gone; if that one "
            "lives, see the lines above. --resume goes on from the last checkpoint\n"
        )

        def say(signum: int) -> None:
            os.write(2, lost.encode())
            os._exit(CODE)

        if not is_first():
            self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(say)
            with contextlib.suppress(AttributeError, OSError):
                ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)


class StopSignal:
    """While it is entered, the first SIGINT or SIGTERM only asks to stop; the second one does what it always does.

    Of several processes all stop after the same step, whichever was asked.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.agreed, self._asked = 0, 0
        everywhere, self._split = (
            NamedSharding(mesh, PartitionSpec()),
            NamedSharding(mesh, PartitionSpec(mesh.axis_names)),
        )
        self._largest = jax.jit(jnp.max, out_shardings=everywhere)
        self._pending: jax.Array | None = None

    def agree(self) -> int:
        """The number of the signal that the run was asked to stop by, 0 while it was not.

        Several processes learn it one step late, so that no device waits for the host.
        """
        if count() == 1:
            self.agreed = self._asked
            return self.agreed
        asked = np.full(1, self._asked, np.int32)
        before, shape = self._pending, (math.prod(self._split.mesh.shape.values()),)
        self._pending = self._largest(jax.make_array_from_callback(shape, self._split, lambda _: asked))
        self.agreed = 0 if before is None else int(before)
        return self.agreed

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, signum: int, frame: Any) -> None:
        self._asked = signum
        self._restore()
        with contextlib.suppress(OSError):  # whatever reads the output may be gone, by the same Ctrl-C
            os.write(
                1, b"\nsaving and stopping after this step; once more to stop at once and lose what is not saved\n"
            )

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: object) -> None:
        self._restore()
