"""Generate text, as `gptjax sample` does: python sample.py --prompt "ROMEO:" """

from gptjax.__main__ import run_command

if __name__ == "__main__":
    run_command("sample")
