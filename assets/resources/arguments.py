"""The options of the commands that the assets run: paths as words, the configuration as a file."""

from pathlib import Path

import yaml

from assets.resources.steps import Step
from notellm2_core.lake import fingerprint
from notellm2_core.recipe import Recipe
from notellm2_core.runtime.files import write_atomically


def note_arguments(step: Step) -> list[str | Path]:
    """The options that every command on notes and their images takes."""
    return [
        "--config", write_config(step.recipe),
        "--notes", step.path("note_tokens"),
        "--images", step.path("vision_features"),
        "--store", feature_store(step.recipe),
    ]  # fmt: skip


def picture_folders(recipe: Recipe) -> tuple[Path, Path]:
    """The notes that the vision features were made of, and where their pictures are."""
    return recipe.dataset("notes").path / "notes", recipe.source


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
