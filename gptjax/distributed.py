"""Several processes train one model: how they join, agree and stop together, and how a lost one is found and named.

Each process sends heartbeats to JAX's coordination service, which process 0 runs. Process 0 judges them. If a process
fails, dies or hangs, all processes exit with one line that names it. A process that is alone may call every function.
"""

import contextlib
import ctypes
import math
import os
import re
import secrets
import signal
import socket
import sys
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax import coordination
from gptjax.coordination import count, index
from gptjax.errors import UserError, exit_code_and_message, first_line

BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0  # without a heartbeat: the process or its network is dead or stopped
BEHIND_SECONDS = 50.0  # without beginning a step that others have begun: the process lives but hangs
FIRST_SECONDS = 1800.0  # the same limit for the first steps, in which one process may compile while others need not
FIRST_STEPS = 3
JOIN_SECONDS = 300
WAIT_SECONDS = 10  # for the others, after which a process says so
LOST_PEER = re.compile("gloo|nccl|connection|socket|peer|unavailable|deadline|heartbeat|barrier|coordination", re.I)
EXIT_CODE = 1  # of a process that lost another one


def is_first() -> bool:
    """Whether this is process 0, which prints and writes everything that is written once."""
    return index() == 0


@contextlib.contextmanager
def joined(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Iterator[None]:
    """Run the block as one of several processes if the flags, or a cluster that JAX recognizes, say so.

    JAX recognizes Cloud TPU, SLURM, Open MPI and Kubernetes. Only process 0 prints. An error in one process, or its
    death, ends all of them with one line that names it and an exit code other than 0. Raises `UserError` if the
    processes cannot find each other.
    """
    if not _connect(coordinator, num_processes, process_id):
        yield
        return
    watch = _Watch()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if is_first() else nowhere):
            yield
    except BaseException as error:
        watch.leave(error)
    watch.finish()


def _connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> bool:
    """Connect to the other processes; False if there are none."""
    if num_processes == 1:
        return False
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM, as StopSignal does
    flags = (coordinator, num_processes, process_id)
    alone = "to train with this process alone pass --num_processes 1"
    together, before = threading.Event(), signal.signal(signal.SIGINT, signal.SIG_DFL)  # JAX's wait ignores Python's
    threading.Thread(target=_await_others, args=(together,), daemon=True).start()
    try:
        jax.distributed.initialize(*flags, initialization_timeout=JOIN_SECONDS + 60)
    except ValueError as error:
        several = any(os.environ.get(name, "1") != "1" for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
        if flags == (None, None, None) and not several and "JAX_COORDINATOR_ADDRESS" not in os.environ:
            return False  # no cluster
        fix = f"pass --coordinator HOST:PORT, --num_processes and --process_id; {alone}"
        raise UserError(f"the processes do not know each other ({error}): {fix}") from error
    except Exception as error:
        address = coordination.address()
        fix = f"start process 0, and let its host accept connections at {address}; {alone}" if address else alone
        raise UserError(f"the processes cannot find each other ({first_line(error)}): {fix}") from error
    finally:
        together.set()
        signal.signal(signal.SIGINT, before)
    return count() > 1


def _await_others(together: threading.Event) -> None:
    """Say after a while for whom this process waits, and end it where JAX would abort it with a stack trace."""
    if together.wait(WAIT_SECONDS):
        return
    here = f"process {index()}: waiting for {count() - 1} other processes at {coordination.address()}"
    print(here, file=sys.stderr, flush=True)
    if not together.wait(JOIN_SECONDS - WAIT_SECONDS):
        os.write(2, f"error: {here} for {JOIN_SECONDS} s; start them all, and let process 0 be reached\n".encode())
        os._exit(2)


def from_first(key: str, function: Callable[[], str]) -> str:
    """Return, in every process, what `function` returns in process 0; the others do not call it.

    A run uses each key once.
    """
    if not is_first():
        return coordination.read(f"first/{key}")
    value = function()
    if count() > 1:
        coordination.write(f"first/{key}", value)
    return value


def after_first(key: str, function: Callable[[], Any]) -> Any:
    """Call `function` in process 0 and then in the others, which find the files that it left on shared storage."""
    result = function() if is_first() else None
    from_first(key, lambda: "done")
    return result if is_first() else function()


def wait_for_all(key: str) -> None:
    """Return once all processes have called it. A run uses each key once."""
    if count() > 1:
        coordination.barrier(key)


def gather(key: str, value: str) -> list[str]:
    """Return, in every process, the values of all of them. A run uses each key once."""
    if count() == 1:
        return [value]
    coordination.write(f"{key}/{index()}", value)
    coordination.barrier(key)
    return list(coordination.read_all(key).values())


def require_same(key: str, values: dict[str, Any]) -> None:
    """Raise `UserError` for the first of the values that differs from process 0's."""
    ours = "\n".join(f"{name}={value}" for name, value in values.items())
    theirs = from_first(key, lambda: ours)
    for here, there in zip(ours.split("\n"), theirs.split("\n"), strict=False):
        if here != there:
            raise UserError(f"{here} here, but {there} in process 0: start all processes alike")


def require_shared(folder: Path) -> None:
    """Raise `UserError` unless this process sees in the folder a file that process 0 makes there."""
    if count() == 1:
        return
    token = folder / from_first("token", lambda: f".shared-{secrets.token_hex(8)}")
    if is_first():
        token.touch()
    end = time.monotonic() + 90  # a network file system may show a new file late
    while not token.exists():
        if time.monotonic() > end:
            raise UserError(f"{folder} is not the folder of process 0: put --out_dir on storage that all hosts share")
        time.sleep(0.2)
    wait_for_all("shared")
    token.unlink(missing_ok=True)


class StopSignal:
    """A context in which the first SIGINT, SIGTERM or SIGHUP only asks the run to stop; the second one acts as usual.

    Several processes all stop after the same step, even if only one of them received the signal.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.agreed, self._asked = 0, 0
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: jax.Array | None = None

    def agree(self) -> int:
        """The number of the signal that stops the run, or 0. All processes call it before every step.

        Several processes agree on a signal one step late, so that no device waits for the host.
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
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # as nohup ignores SIGHUP
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def _note(self, signum: int, frame: Any) -> None:
        self._asked = signum
        self.__exit__()
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended the reader of our output
            os.write(
                sys.stdout.fileno(),
                b"\nsaving and stopping after this step; a second signal stops at once, without saving\n",
            )

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def at_step(step: int) -> None:
    """Note that this process begins a step, by which process 0 sees whether it hangs behind the others."""
    _Watch.step = step


class _Watch:
    """A thread that sends this process's heartbeats and ends the process when another one is lost."""

    step = 0

    def __init__(self) -> None:
        self._beats, self._over = 0, threading.Event()
        coordination.write(f"host/{index()}", socket.gethostname())
        self._judge = Judge(count(), time.monotonic())
        self._coordinator = f"process 0 ({coordination.address()})"  # a name that needs no answer from process 0
        if not is_first():
            self._handle_abort()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        """Send and judge heartbeats in a second thread, since a call does not return if process 0 hangs."""
        with ThreadPoolExecutor(1) as calls:
            while not self._over.wait(BEAT_SECONDS):
                try:
                    verdict = calls.submit(self._beat).result(SILENT_SECONDS)
                except TimeoutError:
                    verdict = f"{self._coordinator} has not answered for {SILENT_SECONDS:.0f} s: it died or was stopped"
                except Exception as error:
                    verdict = f"{self._coordinator} is gone: {first_line(error)}"
                if verdict and not self._over.is_set():
                    fix = "all processes stop; continue from the last checkpoint with --resume"
                    self._end(f"{verdict}; {fix}", EXIT_CODE)

    def _beat(self) -> str:
        """Send a heartbeat; return the sentence about a lost process, or ""."""
        self._beats += 1
        self._tell(f"{self._beats} {self.step}")
        if not is_first():
            return "".join(coordination.read_all("verdict").values())
        beats = {int(process): beat for process, beat in coordination.read_all("beat").items()}
        lost = self._judge.lost(beats, time.monotonic())
        return self._announce(*lost) if lost else ""

    def finish(self) -> None:
        """End well: wait for the other processes, still watching them, then disconnect."""
        with contextlib.suppress(Exception):
            coordination.barrier("end")
        self._stop("done")
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)

    def leave(self, error: BaseException) -> NoReturn:
        """End this process after an error and tell the others, unless the error is that another one was lost."""
        known = exit_code_and_message(error)
        code, message = known or (EXIT_CODE, f"{type(error).__name__}: {first_line(error)}")
        if known is None:
            traceback.print_exception(error)
            if LOST_PEER.search(message):  # meanwhile the thread ends this process with the name of the lost one
                time.sleep(SILENT_SECONDS + BEHIND_SECONDS)
        self._stop(f"failed {message}")
        complaint = f": {message}"
        self._end(self._announce(0, complaint) if is_first() else f"{_name(index())}{complaint}", code)

    def _stop(self, last_beat: str) -> None:
        self._over.set()
        self._thread.join(SILENT_SECONDS)
        self._tell(last_beat)

    def _tell(self, beat: str) -> None:
        with contextlib.suppress(Exception):  # process 0 may have ended
            coordination.write(f"beat/{index()}", beat, overwrite=True)

    def _announce(self, process: int, complaint: str) -> str:
        verdict = f"{_name(process)}{complaint}"
        with contextlib.suppress(Exception):
            coordination.write("verdict/only", verdict, overwrite=True)
        return verdict

    def _end(self, message: str, code: int) -> NoReturn:
        """Exit at once; a normal exit would wait for threads of JAX that wait for the other processes."""
        os.write(2, f"error: {' '.join(message.split())}\n".encode())
        if is_first():
            time.sleep(4 * BEAT_SECONDS + 1)  # the others read the verdict meanwhile
        os._exit(code)

    def _handle_abort(self) -> None:
        """Explain the abort by which JAX, in one of its threads, ends a process whose coordinator is gone.

        The handler is a C function. Python's would wait for the main thread, which waits for a device.
        """
        lost = (
            f"error: process {index()} ends: JAX aborted it, as it does when {self._coordinator} is gone; if that "
            "process lives, see the lines above; continue from the last checkpoint with --resume\n"
        ).encode()

        def explain(signum: int) -> None:
            os.write(2, lost)
            os._exit(EXIT_CODE)

        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(explain)
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)


def _name(process: int) -> str:
    return f"process {process} ({coordination.read_all('host').get(str(process), 'unknown host')})"


@dataclass
class _Seen:
    """A process as process 0 last saw it, by process 0's clock."""

    beat_at: float
    step_at: float
    beat: str = ""
    step: int = 0
    n_steps: int = 0  # steps that were seen to begin


class Judge:
    """Finds the process that failed, is silent, or hangs, from the heartbeats of `n` processes.

    A heartbeat is "NUMBER STEP"; the last one is "done" or "failed MESSAGE".
    """

    def __init__(self, n: int, now: float) -> None:
        self._seen = [_Seen(now, now) for _ in range(n)]

    def lost(self, beats: dict[int, str], now: float) -> tuple[int, str] | None:
        """The lost process and a complaint to follow its name; None if all is well."""
        for process, beat in beats.items():
            seen = self._seen[process]
            if beat != seen.beat:
                seen.beat, seen.beat_at = beat, now
            if beat[0].isdigit() and (step := int(beat.split()[1])) != seen.step:
                seen.step, seen.step_at, seen.n_steps = step, now, seen.n_steps + 1
        front = max(seen.step for seen in self._seen)
        for process, seen in enumerate(self._seen):
            if seen.beat == "done":
                continue
            if seen.beat.startswith("failed "):
                return process, f": {seen.beat.removeprefix('failed ')}"
            if now - seen.beat_at > SILENT_SECONDS:
                return process, f" has not answered for {SILENT_SECONDS:.0f} s: it died or was stopped"
            ahead = [other.step_at for other in self._seen if other.step > seen.step]
            limit = FIRST_SECONDS if seen.n_steps < FIRST_STEPS else BEHIND_SECONDS
            if ahead and now - min(ahead) > limit:
                return process, f" hangs in step {seen.step} while the others wait for it in step {front}"
        return None
