"""What the commands of the assets are given: the folders of the notes, and the configuration as a file."""

from pathlib import Path

import yaml

from assets.resources.steps import Step
from notellm2_core.lake.catalog import Recipe
from notellm2_core.notes.inputs import NoteInputs, PictureFolders
from notellm2_core.runtime.files import write_atomically
from notellm2_core.runtime.fingerprint import fingerprint


def note_inputs(step: Step, pictures: bool = True) -> NoteInputs:
    """The notes and their images; with `pictures` where the model's vision encoder is, or may have been, trained."""
    folders = picture_folders(step.recipe) if pictures else None
    return NoteInputs(step.path("note_tokens"), step.path("vision_features"), feature_store(step.recipe), folders)


def picture_folders(recipe: Recipe) -> PictureFolders:
    """The notes that the vision features were made of, and where their pictures are."""
    return PictureFolders(recipe.dataset("notes").path / "notes", recipe.source)


def feature_store(recipe: Recipe) -> Path:
    """One folder per encoder; every source and every week of this lake shares it."""
    return recipe.lake.root / "vision_store"


def write_config(recipe: Recipe) -> Path:
    """The resolved configuration as a file, so that the logged command can be pasted later."""
    text = yaml.safe_dump(recipe.config.model_dump(mode="json"), sort_keys=False)
    path = recipe.work / "configs" / f"{recipe.config.name}-{fingerprint(text)}.yaml"
    if not path.exists():
        write_atomically(path, text)
    return path
