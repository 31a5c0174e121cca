"""The line that shows what takes long: on a terminal alone, once, and never at the cost of the work."""

import io
import sys

import pytest

from gptjax import coordination
from gptjax.progress import hidden, track, working


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes standard error a terminal; pytest replaces what a fixture itself puts there."""

    def become():
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return become


def test_a_terminal_sees_the_work_and_standard_output_keeps_what_is_printed(terminal, capsys):
    screen = terminal()
    assert list(track(["ab", "c"], "reading [/a/b]", 3, len)) == ["ab", "c"]
    with working("tokenizing", 10) as advance:
        advance(4, "4 tokens")
        print("a result")
    shown = screen.getvalue()
    assert "reading [/a/b]" in shown and "tokenizing" in shown and "4 tokens" in shown and "━" in shown
    assert capsys.readouterr().out == "a result\n" and "a result" not in shown


def test_lines_for_the_same_terminal_go_above(terminal, monkeypatch):
    screen = terminal()
    monkeypatch.setattr(sys, "stdout", Terminal())
    with working("long work"):
        print("a result")
    assert sys.stdout.getvalue() == "" and "a result" in screen.getvalue()


def test_a_part_of_something_shown_is_not_shown(terminal):
    screen = terminal()
    with working("the whole"), working("a part"):
        pass
    with hidden():
        assert list(track(range(3), "in another program's display")) == [0, 1, 2]
    with working("the next"):
        pass
    shown = screen.getvalue()
    assert "the whole" in shown and "the next" in shown and "a part" not in shown and "another" not in shown


def test_a_log_gets_a_plain_line_where_one_is_asked_for(capsys):
    assert list(track([1, 2], "in silence", 2)) == [1, 2]
    with working("compiling the step", say=True) as advance:
        advance()
    assert capsys.readouterr() == ("", "compiling the step ...\n")


def test_process_0_alone_shows_its_work(terminal, monkeypatch):
    screen = terminal()
    for number, shows in ((1, False), (0, True)):
        monkeypatch.setattr(coordination, "index", lambda number=number: number)
        assert list(track([1, 2], "encoding")) == [1, 2]
        assert bool(screen.getvalue()) == shows


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_terminal_that_fails_ends_nothing(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(full, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stderr", full)
        assert list(track([1, 2], "work", 2)) == [1, 2]
        monkeypatch.undo()
