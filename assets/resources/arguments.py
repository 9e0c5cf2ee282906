"""Arguments of the assets' commands: the folders of the notes, and the configuration as a file."""

from pathlib import Path

import yaml

from assets.resources.steps import Step
from notellm2_core.config.settings import Config
from notellm2_core.lake.catalog import Catalog
from notellm2_core.notes.inputs import ImageFolders, NoteInputs
from notellm2_core.runtime.files import write_atomically
from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.schema import NOTES_TABLE


def note_inputs(step: Step, images: bool = True) -> NoteInputs:
    """The notes and their features; with `images`, for a vision encoder that is or was trained, the images too."""
    folders = image_folders(step.catalog) if images else None
    return NoteInputs(step.path("note_tokens"), step.path("vision_features"), feature_store(step.catalog), folders)


def image_folders(catalog: Catalog) -> ImageFolders:
    """The notes table, and the source that holds its images."""
    return ImageFolders(catalog.dataset("notes").path / NOTES_TABLE, catalog.source)


def feature_store(catalog: Catalog) -> Path:
    """The store of vision features, a folder per encoder, shared by all sources and weeks of this lake."""
    return catalog.lake.root / "vision_store"


def write_config(catalog: Catalog, config: Config | None = None) -> Path:
    """A configuration as a file, so that the logged command can be pasted later; None: the catalog's."""
    text = yaml.safe_dump((config or catalog.config).model_dump(mode="json"), sort_keys=False)
    path = catalog.work / "configs" / f"{catalog.config.name}-{fingerprint(text)}.yaml"
    if not path.exists():
        write_atomically(path, text)
    return path
