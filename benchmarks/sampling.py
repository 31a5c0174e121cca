"""Sampling, against nanoGPT's loop, transformers and CTranslate2: python -m benchmarks.sampling [--json]

From one token, 250 tokens of the character model and 100 of GPT-2 124M, temperature 0.8, top-k 200; milliseconds a
token. The limit is the time to read every weight once at the rate of memory in the same run, divided by the number of
streams; the small model's weights fit a cache and may beat it. CTranslate2 takes part if the rivals' Python has it.
"""

import subprocess
from functools import partial

from benchmarks.paired import Contender, Result, in_turn, parser, show

WORKS = {
    "shakespeare_10m": ("shakespeare_10m", 1, 250),
    "shakespeare_10m_8_streams": ("shakespeare_10m", 8, 250),
    "gpt2_124m": ("gpt2_124m", 1, 100),
    "gpt2_124m_8_streams": ("gpt2_124m", 8, 100),
    "gpt2_124m_64_streams": ("gpt2_124m", 64, 100),  # for GPUs
}


def main() -> None:
    options = parser(__doc__, tuple(WORKS), tuple(WORKS)[:-1])
    options.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "int8"), default=["float32"])
    options.add_argument("--rival_dtype", choices=("float32", "bfloat16"), default="float32", help="nanoGPT's on CPUs")
    arguments = options.parse_args()
    has_ctranslate2 = not subprocess.run(
        [arguments.rival_python, "-c", "import ctranslate2"], capture_output=True
    ).returncode
    other_dtype = arguments.rival_dtype
    for i, name in enumerate(arguments.works):
        work, streams, n_tokens = WORKS[name]
        given = {"work": work, "streams": streams, "n_tokens": n_tokens}
        ours = [partial(Contender, "works:our_sampling", dtype=dtype, **given) for dtype in arguments.dtypes]
        rivals: dict[str, tuple[str, dict[str, str]]] = {
            f"nanoGPT's {other_dtype}": ("works:nanogpt_sampling", {"dtype": other_dtype}),
            f"transformers's {other_dtype}": ("works:transformers_sampling", {"dtype": other_dtype}),
        }
        for dtype in arguments.dtypes if has_ctranslate2 else ():
            rivals |= {f"CTranslate2's {dtype}": ("works:ctranslate2_sampling", {"dtype": dtype})}
        others = [partial(Contender, make, arguments.rival_python, **given, **more) for make, more in rivals.values()]
        makers = [*ours, *others, partial(Contender, "works:memory")]
        *done, memory = in_turn(makers, arguments.rounds, required=len(ours))
        results = []
        for dtype, mine in zip(arguments.dtypes, done, strict=False):
            limit = memory and 1e3 * mine.facts["bytes"] / 1e9 * min(memory.values) / streams
            for rival, other in zip(rivals, done[len(ours) :], strict=True):
                if rival.startswith("CTranslate2") and not rival.endswith(dtype):
                    continue
                many = f"{streams} stream{'s' if streams > 1 else ''}"
                title = f"sampling, {work}, {many}, {dtype}, against {rival}"
                rival_ms = other and 1e3 * other.median
                results.append(Result(title, 1e3 * mine.median, rival_ms, "ms a token", limit))
        show(results, arguments, header=i == 0)


if __name__ == "__main__":
    main()
