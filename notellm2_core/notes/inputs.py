"""The folders that every command on notes and their images reads, and their command-line options.

Imports no torch.
"""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from notellm2_core.schema import VISION_FOLDER


class ImageFolders(NamedTuple):
    """Where the images of a lake's notes are."""

    notes: Path  # the notes dataset
    source: Path  # the folder that its image_path is relative to


@dataclass(frozen=True)
class NoteInputs:
    """The notes that a model reads, and their images."""

    notes: Path  # the notes dataset, or its tokens
    images: Path  # output of the features command: note_images.parquet and vision/
    store: Path  # parent of the feature stores, one per vision encoder
    image_folders: ImageFolders | None = None  # required where the vision encoder is, or was, trained

    @property
    def vision(self) -> Path:
        """Folder of the vision encoder that made the features."""
        return self.images / VISION_FOLDER

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Declare --notes, --images, --store and --image-folders."""
        parser.add_argument("--notes", type=Path, required=True, help="folder of the notes dataset, or of its tokens")
        parser.add_argument("--images", type=Path, required=True, help="output folder of the features command")
        parser.add_argument("--store", type=Path, required=True, help="parent of the feature stores")
        parser.add_argument(
            "--image-folders", type=Path, nargs=2, metavar=("NOTES", "SOURCE"),
            help="folders of the notes dataset and of its images, where the vision encoder is, or was, trained",
        )  # fmt: skip

    @classmethod
    def of(cls, args: Namespace) -> "NoteInputs":
        """The folders from the parsed options."""
        folders = ImageFolders(*args.image_folders) if args.image_folders else None
        return cls(args.notes, args.images, args.store, folders)

    def arguments(self) -> list[str]:
        """The folders as command-line options."""
        options = ["--notes", str(self.notes), "--images", str(self.images), "--store", str(self.store)]
        return [*options, "--image-folders", *map(str, self.image_folders)] if self.image_folders else options
