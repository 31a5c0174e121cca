"""Progress of long operations: a line on a terminal, and nothing in a pipe or a log."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gptjax.errors import LenientOutput

Item = TypeVar("Item")
_hidden = False  # while a line is shown: what runs inside of something long is a part of it


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """A block in which no line is shown."""
    global _hidden
    before, _hidden = _hidden, True
    try:
        yield
    finally:
        _hidden = before


@contextlib.contextmanager
def working(what: str, total: int | None = None, say: bool = False) -> Iterator[Callable[..., None]]:
    """Show `what` on a terminal while the block runs, with a bar if there is a `total`, and remove it at the end.

    Yields a function that advances the bar by a number and may change the text. The line is on standard error, and only
    that of process 0; a terminal that fails ends it, and nothing else. With `say` standard error gets a plain line
    where it is no terminal.
    """
    if _hidden or not _is_first() or not sys.stderr:
        yield lambda n=1, text=None: None
        return
    if not sys.stderr.isatty():
        if say:
            print(f"{what} ...", file=sys.stderr, flush=True)
        yield lambda n=1, text=None: None
        return
    bar, left = ([BarColumn()], [TimeRemainingColumn()]) if total else ([], [])
    columns = (SpinnerColumn(), *bar, TextColumn("{task.description}", markup=False), TimeElapsedColumn(), *left)
    console = Console(file=LenientOutput(sys.stderr))  # type: ignore[arg-type]
    above = sys.stdout is not None and sys.stdout.isatty()  # where lines that the block prints go, if to the terminal
    with hidden(), Progress(*columns, console=console, transient=True, redirect_stdout=above) as live:
        task = live.add_task(what, total=total)
        yield lambda n=1, text=None: live.update(task, advance=n, description=text)


def track(
    items: Iterable[Item], what: str, total: int | None = None, size: Callable[[Item], int] = lambda item: 1
) -> Iterator[Item]:
    """Yield the items, and show how much of `total` they are by `size`, by default their number."""
    with working(what, total) as advance:
        for item in items:
            yield item
            advance(size(item))


def _is_first() -> bool:
    if "jax" not in sys.modules:  # a run of several processes has imported it
        return True
    from gptjax import coordination

    return coordination.index() == 0
