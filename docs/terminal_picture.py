"""Draw docs/img/demo.svg from a real run of the demo: python docs/terminal_picture.py."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from rich.console import Console

from normconv.cli.demo import show
from normconv.demo import run

if __name__ == "__main__":
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as folder:
        stages = run(Path(folder))
    console.print("[bold green]$[/] normconv demo", highlight=False)
    show(console, stages, Path("normconv-demo"))
    target = Path(__file__).parent / "img" / "demo.svg"
    target.parent.mkdir(exist_ok=True)
    console.save_svg(str(target), title="normconv demo")
