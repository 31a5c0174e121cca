"""A cache of compiled programs on disk that a kill, a full disk or another process cannot spoil."""

import contextlib
import hashlib
import os
from pathlib import Path

from gptjax.files import replacing, user_cache

MAX_BYTES = 2 << 30


class ProgramCache:
    """JAX's cache of compiled programs, with a file for each, which begins with the SHA-256 of the rest.

    JAX's own cache waits for a lock, and keeps a file that was cut short. Here a file is replaced atomically, without a
    lock, and a damaged one is replaced by the next `put`. What cannot be read or written is compiled.
    """

    def __init__(self, folder: str | Path) -> None:
        """Delete the files that were not used for longest where all of them have more than `MAX_BYTES`."""
        self._path = Path(folder)  # JAX reads it by this name
        with contextlib.suppress(OSError):  # another process may delete the same file
            total = 0
            for file in sorted(self._path.glob("*-cache*"), key=lambda file: file.stat().st_mtime, reverse=True):
                total += file.stat().st_size
                if total > MAX_BYTES:
                    file.unlink()

    def get(self, key: str) -> bytes | None:
        """The program, or None if its file is missing, damaged or not readable."""
        file = self._path / f"{key}-cache"
        with contextlib.suppress(OSError):
            data = file.read_bytes()
            if hashlib.sha256(data[32:]).digest() == data[:32]:
                with contextlib.suppress(OSError):
                    os.utime(file)
                return data[32:]
        return None

    def put(self, key: str, value: bytes) -> None:
        """Write the program with its SHA-256; where that fails there is no file."""
        with contextlib.suppress(OSError), replacing(self._path / f"{key}-cache") as temporary:
            temporary.write_bytes(hashlib.sha256(value).digest() + value)


def cache_compiled_programs() -> None:
    """Cache on disk the programs that take XLA longer than 0.2 seconds to compile, at most 2 GiB of them.

    The folder is ~/.cache/gptjax/xla (XDG_CACHE_HOME replaces ~/.cache), or else a subfolder of the one that
    JAX_COMPILATION_CACHE_DIR names, where JAX's own limits hold. There is no cache if JAX_ENABLE_COMPILATION_CACHE is
    false or if the folder cannot be made.
    """
    import jax

    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named and "://" in named:  # a bucket
        return
    try:
        folder = Path(named) / "gptjax" if named else user_cache("xla")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not named:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with contextlib.suppress(ImportError):  # a later JAX without this private module keeps its own cache
        from jax._src import compilation_cache

        vars(compilation_cache)["get_file_cache"] = lambda _: (ProgramCache(folder), str(folder))
