"""Train a GPT, as `gptjax train` does: python train.py --config configs/shakespeare.py"""

from gptjax.__main__ import run_command

if __name__ == "__main__":
    run_command("train")
