"""The images behind the image ids of a lake, read from its notes or its source folder. Imports no torch.

They are needed for an encoder that no store has features of.
"""

from collections.abc import Collection, Mapping, Sequence

from PIL import Image

from notellm2_core.config.source import NoteReadingSettings
from notellm2_core.notes.inputs import ImageFolders
from notellm2_core.notes.source_reader import read_note_table
from notellm2_core.vision import images

_OF_THE_LAKE = NoteReadingSettings(clean_html=False)  # its texts have been cleaned


class NoteImages:
    """The encoded images of notes, by image id."""

    def __init__(
        self, folders: ImageFolders, image_id_of: Mapping[str, str | None], note_ids: Collection[str], max_pixels: int
    ) -> None:
        """`image_id_of`: note_id -> image_id, from `read_note_images`. `note_ids`: the notes whose images are read.

        Raises ValueError where the notes cannot be read.
        """
        images.allow_pixels(max_pixels)
        self.max_pixels = max_pixels
        self._note_of: dict[str, str] = {}  # image_id -> the first note that has it
        for note_id in sorted(note_ids):
            if (image_id := image_id_of.get(note_id)) is not None:
                self._note_of.setdefault(image_id, note_id)
        self._table = (
            read_note_table(folders.notes, folders.source, {*self._note_of.values()}, _OF_THE_LAKE)
            if self._note_of
            else None
        )

    @property
    def image_ids(self) -> list[str]:
        """The distinct image ids in the order of the notes, the fastest order to read them in."""
        return list(self._note_of)

    def read(self, image_ids: Sequence[str]) -> list[bytes]:
        """The encoded bytes of these images. Raises ValueError where one has changed since its features were made."""
        if self._table is None:
            return []
        images_data = []
        for image_id, note in zip(image_ids, self._table.notes([self._note_of[i] for i in image_ids]), strict=True):
            data, path = (note.image, None) if isinstance(note.image, bytes) else (None, str(note.image or ""))
            encoded = images.fetch(self._table.images, path, data, self.max_pixels)
            if encoded.status != "ok" or encoded.image_id != image_id:
                raise ValueError(
                    f"the image of note {note.note.note_id!r} has changed since its features were made: run everything "
                    "again, from the notes on."
                )
            images_data.append(encoded.data)
        return images_data

    def decode(self, data: bytes) -> Image.Image:
        """The RGB image of bytes that `read` has returned. Raises ValueError where they can no longer be decoded."""
        status, image = images.decode(data, self.max_pixels)
        if image is None:
            note_id = self._note_of[images.EncodedImage("ok", data).image_id]
            raise ValueError(
                f"the image of note {note_id!r} can no longer be decoded ({status}): run everything again, from the "
                "notes on."
            )
        return image
