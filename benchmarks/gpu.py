"""All that a GPU at hand for minutes should measure: python -m benchmarks.gpu [--sweep]

Appends to benchmarks/results/NAME.jsonl, with NAME made of the device's: training steps and sampling against PyTorch
and transformers. Then it runs tests/test_gpu.py. What the minutes do not suffice for is left out, with a line that says
so. With --sweep it prints instead what a training step takes with other layers, pieces of the loss and flags of XLA.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from functools import partial

from benchmarks.paired import ROOT, Contender, circumstances, in_turn

BFLOAT16 = "--rounds 3 --json --rival_dtype bfloat16"
COMMANDS = (
    f"-m benchmarks.train_step --works gpt2_124m_16x1024 --dtype bfloat16 {BFLOAT16}",
    f"-m benchmarks.train_step --works shakespeare_10m --dtype bfloat16 {BFLOAT16}",
    f"-m benchmarks.sampling --works gpt2_124m --dtypes bfloat16 {BFLOAT16}",
    "-m pytest -n 0 tests/test_gpu.py",
    f"-m benchmarks.sampling --works gpt2_124m_64_streams --dtypes bfloat16 {BFLOAT16}",
    f"-m benchmarks.train_step --works gpt2_350m_8x1024 --dtype bfloat16 {BFLOAT16}",
)
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": "cuda,cpu"}  # memory is shared with PyTorch
SWEEP = {
    "as it is": ({}, ""),
    "looped layers": ({"layers": "looped"}, ""),
    "the loss in pieces of 1/64 of the memory": ({"piece_share": 1 / 64}, ""),
    "latency hiding": ({}, "--xla_gpu_enable_latency_hiding_scheduler=true"),
    "matmuls by Triton": ({}, "--xla_gpu_triton_gemm_any=true"),
    "cuBLASLt": ({}, "--xla_gpu_enable_cublaslt=true"),
    "no command buffers": ({}, "--xla_gpu_enable_command_buffer="),
}


def run_all(minutes: float) -> None:
    """Run the commands until the minutes are over; append each line of JSON to the machine's file as it comes."""
    end = time.monotonic() + 60 * minutes
    name = re.sub(r"\W+", "_", circumstances()["machine"].lower().removeprefix("nvidia "))
    path = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
    for command in COMMANDS:
        print(f"python {command}", file=sys.stderr, flush=True)
        arguments = [sys.executable, *command.split()]
        try:
            done = subprocess.run(
                arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=end - time.monotonic()
            )
        except subprocess.TimeoutExpired:
            print(f"the {minutes:g} minutes did not suffice for it", file=sys.stderr)
            continue
        print(done.stdout, end="", flush=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(line for line in done.stdout.splitlines(True) if line.startswith("{"))
        if done.returncode:
            print(f"it failed with exit code {done.returncode}", file=sys.stderr)


def sweep(work: str) -> None:
    """Print the milliseconds of a training step in each of the ways."""
    flags = os.environ.get("XLA_FLAGS", "")
    for name, (options, more) in SWEEP.items():
        os.environ["XLA_FLAGS"] = f"{flags} {more}".strip()
        make = partial(Contender, "works:our_step", work=work, dtype="bfloat16", **options)
        try:
            [ours] = in_turn([make], 2)
        except SystemExit as error:
            print(f"{name}: {error}", flush=True)
        else:
            print(f"{1e3 * ours.median:9.2f} ms  {name}{': ' + more if more else ''}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new is measured")
    parser.add_argument("--sweep", metavar="WORK", nargs="?", const="gpt2_124m_16x1024", help="as gpt2_124m_16x1024")
    arguments = parser.parse_args()
    os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    if "(family" in (circumstances()["machine"] or "(family"):
        raise SystemExit("error: JAX has no GPU here: pip install 'jax[cuda12]', or see nvidia-smi")
    if arguments.sweep:
        sweep(arguments.sweep)
    else:
        run_all(arguments.minutes)


if __name__ == "__main__":
    main()
