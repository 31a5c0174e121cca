"""A batch from token files, against nanoGPT's get_batch: python -m benchmarks.data_loading [--json]"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.paired import Contender, Result, in_turn, parser, show
from gptjax.data.token_files import UINT16, write_tokens

WORKS = {"12x64": (12, 64), "64x256": (64, 256), "32x1024": (32, 1024)}
N_TOKENS = 100_000_000  # 200 MB, which the page cache holds


def main() -> None:
    arguments = parser(__doc__, tuple(WORKS)).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder, "train.bin"), [np.arange(N_TOKENS, dtype=np.uint32) % 50_257], UINT16)
        for i, work in enumerate(arguments.works):
            batch_size, block_size = WORKS[work]
            given = {"folder": folder, "batch_size": batch_size, "block_size": block_size}
            ours, rival = in_turn(
                [
                    partial(Contender, "works:our_batches", **given),
                    partial(Contender, "works:nanogpt_batches", arguments.rival_python, **given),
                ],
                arguments.rounds,
                required=2,
            )
            name = f"data loading, a batch of {work} tokens, against nanoGPT's get_batch"
            show([Result(name, 1e3 * ours.median, 1e3 * rival.median, "ms")], arguments, header=i == 0)


if __name__ == "__main__":
    main()
