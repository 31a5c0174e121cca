"""A training step, against nanoGPT's in PyTorch: python -m benchmarks.train_step [--json]

The limit is the step's FLOPs (6 N + 12 L D T a token) at the rate of matmuls in the same run.
"""

from functools import partial

from benchmarks.paired import Contender, Result, in_turn, parser, show

WORKS = ("nanogpt_cpu", "shakespeare_10m", "gpt2_124m", "gpt2_124m_16x1024", "gpt2_350m_8x1024")  # two are for GPUs


def main() -> None:
    options = parser(__doc__, WORKS, WORKS[:-2])
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of our activations")
    options.add_argument("--rival_dtype", choices=("float32", "bfloat16"), default="float32", help="nanoGPT's on CPUs")
    arguments = options.parse_args()
    for i, work in enumerate(arguments.works):
        rival = partial(Contender, "works:torch_step", arguments.rival_python, work=work, dtype=arguments.rival_dtype)
        ours, compiled, eager, peak = in_turn(
            [
                partial(Contender, "works:our_step", work=work, dtype=arguments.dtype),
                partial(rival, compiled=True),
                partial(rival, compiled=False),
                partial(Contender, "works:our_matmul", dtype=arguments.dtype),
            ],
            arguments.rounds,
        )
        limit = peak and 1e3 * ours.facts["flops"] / 1e12 * min(peak.values)
        name = f"train step, {work}, {arguments.dtype}, against PyTorch {arguments.rival_dtype}"
        pairs = [(f"{name} compiled", compiled), (f"{name} eager", eager)]
        results = [Result(name, 1e3 * ours.median, other and 1e3 * other.median, "ms", limit) for name, other in pairs]
        show(results, arguments, header=i == 0)


if __name__ == "__main__":
    main()
