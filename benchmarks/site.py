"""A hook of mkdocs: `<!-- plot: NAME -->` on a page becomes that plot, drawn from results/result.json."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.structure.files import File

from benchmarks.peers import plots
from benchmarks.peers.results import read


def on_files(files: Any, config: Any) -> None:
    """Add the plots to the site's files."""
    for name, svg in plots.draw(read()):
        files.append(File.generated(config, f"plots/{name}", content=svg))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Show the plots where the page names them, in the shade of the page."""
    shades = "".join(rf"![\1](plots/\1-{shade}.svg#only-{shade})" for shade in plots.INK)
    return re.sub(r"<!-- plot: (\w+) -->", shades, markdown)
