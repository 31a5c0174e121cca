"""Make the README's pictures from a run: python -m benchmarks.pictures out/shakespeare compare.html

They are docs/shakespeare.png (the losses), docs/sample.svg (a sample in a terminal) and docs/compare.png (the page of
`gptjax compare`, by Chromium).
"""

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from benchmarks.paired import ROOT

DOCS = ROOT / "docs"


def sample_picture(run: Path, options: list[str]) -> str:
    """Write docs/sample.svg; return the sample."""
    command = [sys.executable, str(ROOT / "sample.py"), "--run", str(run), "--prompt", "ROMEO:", *options]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    console = Console(record=True, width=64, file=io.StringIO())
    console.print(Text(text))
    console.save_svg(str(DOCS / "sample.svg"), title='python sample.py --prompt "ROMEO:"')
    return text


def page_picture(page: Path) -> None:
    """Write docs/compare.png, the upper part of a page."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        options += ["--window-size=1100,1000", "--force-device-scale-factor=1.5"]
        subprocess.run(
            [browser, *options, f"--screenshot={DOCS / 'compare.png'}", page.resolve().as_uri()],
            check=True,
            capture_output=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("page", type=Path, help="compare.html")
    parser.add_argument("--max_new_tokens", default="180", help="of the sample")
    parser.add_argument("--seed", default="1337", help="of the sample")
    arguments = parser.parse_args()
    shutil.copy(arguments.run / "loss.png", DOCS / "shakespeare.png")
    page_picture(arguments.page)
    print(sample_picture(arguments.run, ["--max_new_tokens", arguments.max_new_tokens, "--seed", arguments.seed]))


if __name__ == "__main__":
    main()
