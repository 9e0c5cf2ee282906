"""The pictures behind the image ids of a lake, read from where its notes have them: for an encoder that no store has
features of. Imports no torch.
"""

from collections.abc import Collection, Mapping, Sequence

from PIL import Image

from notellm2_core.notes.inputs import ImageFolders
from notellm2_core.notes.source_reader import read_note_table
from notellm2_core.vision import images


class NoteImages:
    """The encoded pictures of some notes, by image id."""

    def __init__(
        self, folders: ImageFolders, note_images: Mapping[str, str | None], notes: Collection[str], max_pixels: int
    ) -> None:
        """`note_images`: note_id -> image_id, as the features command told them; `notes`: those that are wanted.

        Raises ValueError where the notes cannot be read.
        """
        images.allow_pixels(max_pixels)
        self.max_pixels = max_pixels
        self._note_of: dict[str, str] = {}  # image_id -> the first note that has it
        for note_id in sorted(notes):
            if (image_id := note_images.get(note_id)) is not None:
                self._note_of.setdefault(image_id, note_id)
        self._table = (
            read_note_table(folders.notes, folders.source, {*self._note_of.values()}) if self._note_of else None
        )

    @property
    def image_ids(self) -> list[str]:
        """Distinct, in the order of the notes, in which they are read the fastest."""
        return list(self._note_of)

    def read(self, image_ids: Sequence[str]) -> list[bytes]:
        """The encoded bytes. Raises ValueError where a picture is no longer what it was."""
        if self._table is None:
            return []
        found = []
        for image_id, note in zip(image_ids, self._table.notes([self._note_of[i] for i in image_ids]), strict=True):
            data, path = (note.image, None) if isinstance(note.image, bytes) else (None, str(note.image or ""))
            encoded = images.fetch(self._table.images, path, data, self.max_pixels)
            if encoded.status != "ok" or encoded.image_id != image_id:
                raise ValueError(
                    f"the picture of note {note.note.note_id!r} is no longer what it was when its features were made: "
                    "run everything again, from the notes on."
                )
            found.append(encoded.data)
        return found

    def decode(self, data: bytes) -> Image.Image:
        """RGB, of what `read` gave; it was a picture when its features were made."""
        status, image = images.decode(data, self.max_pixels)
        if image is None:
            raise ValueError(
                f"a picture cannot be decoded any more ({status}): run everything again, from the notes on."
            )
        return image
