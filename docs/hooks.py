"""Links of these pages that lead out of docs/: results of the benchmarks become pages, other files are named.

On GitHub such links work as they are; on the site they would be dead. A link to a missing file stops the build.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """The results as pages, results/NAME.md, and the benchmarks' own page."""
    pages = {f"results/{file.name}": file for file in sorted(RESULTS.glob("*.md"))}
    for uri, file in {"results/index.md": RESULTS.parent / "README.md", **pages}.items():
        files.append(File.generated(config, uri, content=file.read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links that leave docs/ to the pages above; those to other files become their names."""
    here = page.file.src_uri
    origin = RESULTS / Path(here).name if here.startswith("results/") else DOCS / here
    if here == "results/index.md":
        origin = RESULTS.parent / "README.md"

    def target(match: re.Match[str]) -> str:
        mark, text, link, anchor = match.groups()
        path = (origin.parent / link).resolve()
        if not path.exists():
            raise PluginError(f"{here}: the link to {link} is dead: there is no {path.relative_to(ROOT)}")
        if path == RESULTS.parent / "README.md":
            page_uri = "results/index.md"
        elif path.parent == RESULTS and path.suffix == ".md":
            page_uri = f"results/{path.name}"
        elif path.is_relative_to(DOCS):
            page_uri = str(path.relative_to(DOCS))
        else:
            name = str(path.relative_to(ROOT))
            return f"`{name}`" if text.strip("`") in (name, path.name) else f"{text} (`{name}`)"
        up = "../" * here.count("/")
        return f"{mark}[{text}]({up}{page_uri}{anchor or ''})"

    return LINK.sub(target, markdown)
