"""Tables and plots of a dataset as metadata that Dagster's UI shows."""

import base64
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

if TYPE_CHECKING:
    from notellm2_core.release.drift import Drift


def file_metadata(folder: Path, files: Mapping[str, Sequence[str]]) -> dict[str, dg.MetadataValue]:
    """Metadata name -> Markdown of its .md, .png and .jpg files in `folder`, joined; missing files are skipped."""
    paths = {name: [folder / file for file in group] for name, group in files.items()}
    texts = {name: "\n".join(map(_markdown, filter(Path.exists, group))) for name, group in paths.items()}
    return {name: dg.MetadataValue.md(text) for name, text in texts.items() if text}


def table(rows: Sequence[Mapping[str, Any]], floats: Collection[str]) -> dg.TableMetadataValue:
    """Rows with the same keys as a table; the columns `floats` hold numbers, the others text."""
    columns = [dg.TableColumn(name, "float" if name in floats else "string") for name in rows[0]]
    return dg.MetadataValue.table([dg.TableRecord(dict(row)) for row in rows], dg.TableSchema(columns))


def _markdown(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text()
    return image_markdown(path.stem, {".jpg": "jpeg", ".png": "png"}[path.suffix], path.read_bytes())


def drift_page(names: Iterable[str], drifts: "Sequence[Drift]", accepted: Collection[str]) -> dict[str, Any]:
    """Gates of the data as a table, and their figures beside their past as a plot."""
    from notellm2_core.release.drift import data_gates, to_markdown, to_plot

    page = to_markdown(data_gates(names, drifts, accepted))
    if (plot := to_plot(drifts)) is not None:
        page += "\n" + image_markdown("drift", "png", plot)
    return {"drift": dg.MetadataValue.md(page)}


def image_markdown(title: str, kind: str, data: bytes) -> str:
    """An image in Markdown. kind: "jpeg" or "png"."""
    return f"![{title}](data:image/{kind};base64,{base64.b64encode(data).decode()})"
