"""The machine: the cache of compiled programs."""

import os

from gptjax.compilation_cache import MAX_BYTES, ProgramCache


def test_a_cached_program_is_whole_or_absent(tmp_path):
    cache, file = ProgramCache(tmp_path), tmp_path / "step-cache"
    assert cache.get("step") is None
    cache.put("step", b"program")
    for damaged in (file.read_bytes()[:-1], b"", b"another format" * 9, bytes([file.read_bytes()[0] ^ 1])):
        assert ProgramCache(tmp_path).get("step") == b"program"
        file.write_bytes(damaged)
        assert cache.get("step") is None
        cache.put("step", b"program")
    file.unlink()
    file.mkdir()  # as unreadable as another user's file
    cache.put("step", b"program")
    assert cache.get("step") is None and [path.name for path in tmp_path.iterdir()] == ["step-cache"]
    ProgramCache(tmp_path / "nowhere").put("step", b"program")


def test_the_programs_that_were_not_used_for_longest_are_deleted(tmp_path):
    cache = ProgramCache(tmp_path)
    for age, key in enumerate(("used", "new", "old")):
        cache.put(key, b"")
        os.utime(tmp_path / f"{key}-cache", (0, 1000 - age))
    with (tmp_path / "used-cache").open("r+b") as file:  # sparse
        file.truncate(MAX_BYTES - 40)
    ProgramCache(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"used-cache", "new-cache"}
