"""All that a GPU at hand for minutes should measure: python -m benchmarks.gpu [--sweep]

Appends to benchmarks/results/NAME.jsonl, with NAME made of the device's: training steps and sampling against PyTorch
and transformers; and writes docs/performance.md anew. It also runs tests/test_gpu.py. What the minutes do not suffice
for is left out, with a line that says so. With --sweep it prints instead what a training step takes with other layers,
pieces of the loss and flags of XLA.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

from benchmarks import page
from benchmarks.paired import ROOT, Contender, circumstances, in_turn

BFLOAT16 = "--rounds 3 --json --rival_dtype bfloat16"
COMMANDS = (
    f"-m benchmarks.train_step --works gpt2_124m_16x1024 --dtype bfloat16 {BFLOAT16}",
    f"-m benchmarks.train_step --works shakespeare_10m --dtype bfloat16 {BFLOAT16}",
    f"-m benchmarks.sampling --works gpt2_124m --dtypes bfloat16 {BFLOAT16}",
    "-m pytest -o addopts= -o filterwarnings=default tests/test_gpu.py",  # without plugins, with any versions
    f"-m benchmarks.sampling --works gpt2_124m_64_streams --dtypes bfloat16 {BFLOAT16}",
    f"-m benchmarks.train_step --works gpt2_350m_8x1024 --dtype bfloat16 {BFLOAT16}",
)
NEEDED = ("torch", "transformers", "pytest", "beartype")
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # memory is shared with PyTorch
    "JAX_PLATFORMS": "cuda,cpu",
    "CUDA_VISIBLE_DEVICES": "0",  # one against one
}
SWEEP = {
    "as it is": ({}, ""),
    "looped layers": ({"layers": "looped"}, ""),
    "the loss in pieces of 1/64 of the memory": ({"piece_share": 1 / 64}, ""),
    "latency hiding": ({}, "--xla_gpu_enable_latency_hiding_scheduler=true"),
    "matmuls by Triton": ({}, "--xla_gpu_triton_gemm_any=true"),
    "cuBLASLt": ({}, "--xla_gpu_enable_cublaslt=true"),
    "no command buffers": ({}, "--xla_gpu_enable_command_buffer="),
}


def run_all(minutes: float, rival_python: str) -> int:
    """Run the commands until the minutes are over; append each line of JSON to the machine's file as it comes.

    Returns how many commands failed or were left out.
    """
    end, n_failed = time.monotonic() + 60 * minutes, 0
    name = re.sub(r"\W+", "_", circumstances()["machine"].lower().removeprefix("nvidia "))
    path = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
    for command in COMMANDS:
        print(f"python {command}", file=sys.stderr, flush=True)
        rival = [] if "pytest" in command or rival_python == sys.executable else ["--rival_python", rival_python]
        arguments = [sys.executable, *command.split(), *rival]
        group = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            output, _ = group.communicate(timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(group.pid, signal.SIGKILL)  # with its contenders, which would disturb what follows
            output, _ = group.communicate()
            print(f"the {minutes:g} minutes did not suffice for it", file=sys.stderr)
        except BaseException:  # as Ctrl-C, which only this process gets
            os.killpg(group.pid, signal.SIGKILL)
            raise
        print(output, end="", flush=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(line for line in output.splitlines(True) if line.startswith("{"))
        if group.returncode:
            n_failed += 1
            print(f"it ended with exit code {group.returncode}", file=sys.stderr)
    return n_failed


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
    parser.add_argument("--rival_python", default=sys.executable, help="an interpreter that has PyTorch")
    arguments = parser.parse_args()
    os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    if "(family" in (circumstances()["machine"] or "(family"):
        raise SystemExit("error: JAX has no GPU here: pip install 'jax[cuda12]', or see nvidia-smi")
    if arguments.sweep:
        sweep(arguments.sweep)
        return
    for package in NEEDED:
        python = arguments.rival_python if package in NEEDED[:2] else sys.executable
        if subprocess.run([python, "-c", f"import {package}"], capture_output=True).returncode:
            print(f"{python} cannot import {package}: what needs it is left out", file=sys.stderr)
    n_failed = run_all(arguments.minutes, arguments.rival_python)
    page.main()
    if n_failed:
        raise SystemExit(f"error: {n_failed} of {len(COMMANDS)} commands did not finish")


if __name__ == "__main__":
    main()
