"""Tokenizing, against nanoGPT's prepare.py: python -m benchmarks.tokenizing CORPUS GPT2_FOLDER [--json]

CORPUS is a text file, GPT2_FOLDER has GPT-2's encoder.json and vocab.bpe. `bpe` needs tiktoken.
"""

from functools import partial
from pathlib import Path

from benchmarks.paired import Contender, Result, in_turn, parser, show

WORKS = {"characters": ("our_characters", "nanogpt_characters"), "bpe": ("our_bpe", "tiktoken_bpe")}


def main() -> None:
    options = parser(__doc__, tuple(WORKS))
    options.add_argument("corpus", type=Path)
    options.add_argument("vocabulary", type=Path)
    arguments = options.parse_args()
    for i, work in enumerate(arguments.works):
        given = {"corpus": str(arguments.corpus.resolve())}
        given |= {"vocabulary": str(arguments.vocabulary.resolve())} if work == "bpe" else {}
        makers = [partial(Contender, f"works:{make}", **given) for make in WORKS[work]]
        ours, rival = in_turn(makers, arguments.rounds, required=2)
        name = f"tokenizing, {work}, one core, against {'tiktoken' if work == 'bpe' else 'nanoGPT'}"
        result = Result(name, 1e3 * ours.median, 1e3 * rival.median, "ms a million characters")
        show([result], arguments, header=i == 0)


if __name__ == "__main__":
    main()
