"""JAX's coordination service: this process's number, and a key-value store that all processes of a run share.

JAX keeps both private. This is the only file that reads them.
"""

from operator import attrgetter
from typing import Any

import jax

from gptjax.errors import UserError

TRIED = "0.10 and 0.12"  # versions of jax
WAIT_MS = 24 * 3600 * 1000  # process 0 may take hours to prepare data; if it dies meanwhile, the watch ends the wait


def index() -> int:
    """This process's number, from 0. Unlike `jax.process_index` it does not initialize the devices."""
    return int(_private("process_id")) if jax.distributed.is_initialized() else 0


def count() -> int:
    """The number of processes, without initializing the devices."""
    return int(_private("num_processes")) if jax.distributed.is_initialized() else 1


def address() -> Any:
    """HOST:PORT of the service, which process 0 runs, or None."""
    return _private("coordinator_address")


def write(key: str, value: str, overwrite: bool = False) -> None:
    """Write a key for all processes to read."""
    _private("client.key_value_set")(f"gptjax/{key}", value, allow_overwrite=overwrite)


def read(key: str) -> str:
    """The value of a key, once a process has written it."""
    return str(_private("client.blocking_key_value_get")(f"gptjax/{key}", WAIT_MS))


def read_all(folder: str) -> dict[str, str]:
    """The values of all keys FOLDER/NAME, by name."""
    found = _private("client.key_value_dir_get")(f"gptjax/{folder}/")
    return {key.rpartition("/")[2]: value for key, value in found}


def barrier(name: str) -> None:
    """Wait until all processes call it."""
    _private("client.wait_at_barrier")(f"gptjax/{name}", WAIT_MS)


def _private(path: str) -> Any:
    try:
        from jax._src.distributed import global_state

        return attrgetter(path)(global_state)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"several processes can train with jax {TRIED}, but not with jax {jax.__version__} ({error}): "
            "install one of those, or adapt gptjax/coordination.py"
        ) from error
