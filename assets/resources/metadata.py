"""Tables and plots of a dataset as metadata that Dagster's UI shows."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import dagster as dg


def file_metadata(folder: Path, files: Mapping[str, Sequence[str]]) -> dict[str, dg.MetadataValue]:
    """Metadata name -> Markdown of its .md, .png and .jpg files in `folder`, joined; missing files are skipped."""
    paths = {name: [folder / file for file in group] for name, group in files.items()}
    texts = {name: "\n".join(map(_markdown, filter(Path.exists, group))) for name, group in paths.items()}
    return {name: dg.MetadataValue.md(text) for name, text in texts.items() if text}


def _markdown(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text()
    kind = {".jpg": "jpeg", ".png": "png"}[path.suffix]
    return f"![{path.stem}](data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()})"
