"""Notes -> tensors: tokens, positions of the visual embeddings and of the compressed words, padding.

Shapes: N notes, T tokens of the longest, L_c visual embeddings, L patches of width h_v, M distinct images, S input side
in pixels.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import notellm2_core.runtime.torch_compat  # noqa: F401, before transformers

# isort: split
import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from notellm2_core.config.data import TextSettings
from notellm2_core.config.methods import InputKind, PromptName
from notellm2_core.notes.batch import EncodedNote, NoteBatch
from notellm2_core.notes.note import Note
from notellm2_core.notes.note_tokenizer import FieldTokens, NoteTokenizer
from notellm2_core.notes.prompts import IMAGE_TOKEN, PROMPTS, Field, Mark, name_of

_SETTINGS_FILE = "processor_config.json"  # the name that AutoProcessor expects
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class MLRMProcessor:
    """Turns notes into token ids, and token ids with image features into a batch."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: TextSettings,
        prompt: PromptName,
        num_queries: int,
        num_patches: int,
        vision_width: int,
        padding_side: Literal["right", "left"] = "right",
    ) -> None:
        """`tokenizer`: see NoteTokenizer. `num_queries` is L_c.

        Raises ValueError for an unknown prompt.
        """
        if prompt not in PROMPTS:
            raise ValueError(f"prompt = {prompt!r}; choose one of {', '.join(PROMPTS)}")
        self.note_tokenizer = NoteTokenizer(tokenizer, text)
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.num_queries = num_queries
        self.num_patches = num_patches
        self.vision_width = vision_width
        self.padding_side = padding_side
        # The mask marks padding, never the id, so any id will do (many tokenizers pad with eos).
        self._padding_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        literals = [p for p in PROMPTS[prompt] if isinstance(p, str)]
        self._literal_ids = {
            p: np.array(ids) for p, ids in zip(literals, self.note_tokenizer.ids(literals), strict=True)
        }
        self._start_ids = self._start_of_sequence()
        self._template_length = sum(num for _, _, num in self.layout())

    def encode(self, note: Note, inputs: InputKind = "multimodal") -> EncodedNote:
        """Tokenise `note` in this method's prompt. Raises ValueError for an unknown kind of input."""
        return self.lay_out(self.note_tokenizer.tokenize([note])[0], inputs)

    def lay_out(self, tokens: FieldTokens, inputs: InputKind = "multimodal") -> EncodedNote:
        """A note's tokens in this method's prompt.

        inputs = image: the text fields are empty; text: the image is left out. Either way the template stays. Raises
        ValueError for an unknown kind of input.
        """
        require_input_kind(inputs)
        image_id, visual_word_id = self.note_tokenizer.new_token_ids
        parts = [np.array(self._start_ids, dtype=np.int64)]
        length = len(self._start_ids)
        image_start = visual_index = -1
        for piece in PROMPTS[self.prompt]:
            if isinstance(piece, str):
                part = self._literal_ids[piece]
            elif isinstance(piece, Field):
                if inputs == "image":
                    continue
                part = getattr(tokens, piece.name)
            elif piece == Mark(IMAGE_TOKEN):
                image_start = length
                part = np.full(self.num_queries, image_id)
            else:
                visual_index = length - 1  # "the previous hidden state of the token <IMG_EMB>"
                part = np.array([visual_word_id])
            parts.append(part)
            length += len(part)
        return EncodedNote(np.concatenate(parts, dtype=np.int64), image_start, visual_index, inputs != "text")

    def num_tokens(self, tokens: FieldTokens, inputs: InputKind = "multimodal") -> int:
        """The length of `lay_out(tokens, inputs)`."""
        require_input_kind(inputs)
        return self._template_length + (0 if inputs == "image" else sum(map(len, tokens)))

    @property
    def num_shared(self) -> int:
        """Number of tokens at the start that all notes share, before their image or text."""
        num = len(self._start_ids)
        for piece in PROMPTS[self.prompt]:
            if not isinstance(piece, str):
                break
            num += len(self._literal_ids[piece])
        return num

    def layout(self) -> list[tuple[str, int, int]]:
        """The pieces of the prompt of a note without text: (name, first position, number of tokens)."""
        pieces: list[tuple[str, int, int]] = []

        def add(name: str, num_tokens: int) -> None:
            pieces.append((name, sum(p[2] for p in pieces), num_tokens))

        if self._start_ids:
            add("start of sequence", len(self._start_ids))
        for piece in PROMPTS[self.prompt]:
            if isinstance(piece, str):
                num_tokens = len(self._literal_ids[piece])
            else:
                num_tokens = 0 if isinstance(piece, Field) else self.num_queries if piece == Mark(IMAGE_TOKEN) else 1
            add(name_of(piece), num_tokens)
        return pieces

    def collate(
        self,
        encoded: Sequence[EncodedNote],
        patches: np.ndarray | None,
        global_feature: np.ndarray | None,
        has_image: np.ndarray,
        pixels: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> NoteBatch:
        """A batch of N notes.

        patches [N, L, h_v] and global_feature [N, h_v] of any float type (None: no note has an image), has_image [N]
        bool. Rows without image may hold any values: they become zeros. pixels, in place of features: images
        [M, S, S, 3] and each note's row [N] in them. Raises ValueError if a shape does not fit.
        """
        n, length = len(encoded), max(map(len, encoded))
        input_ids = torch.full((n, length), self._padding_id, dtype=torch.int64)
        attention_mask = torch.zeros(n, length, dtype=torch.int64)
        image_mask = torch.zeros(n, length, dtype=torch.bool)
        start = torch.tensor([length - len(e) if self.padding_side == "left" else 0 for e in encoded])
        for i, note in enumerate(encoded):
            first = int(start[i])
            input_ids[i, first : first + len(note)] = torch.from_numpy(note.token_ids)
            attention_mask[i, first : first + len(note)] = 1
            if note.image_start >= 0:
                image_mask[i, first + note.image_start : first + note.image_start + self.num_queries] = True
        visual_index = torch.tensor([e.visual_index for e in encoded])
        reads_image = np.asarray(has_image, dtype=bool) & np.array([e.reads_image for e in encoded])
        if pixels is None:
            image_tensors = {
                "patches": _features(patches, reads_image, (n, self.num_patches, self.vision_width)),
                "global_feature": _features(global_feature, reads_image, (n, self.vision_width)),
            }
        else:
            image_tensors = dict(zip(("pixels", "image_index"), map(torch.from_numpy, pixels), strict=True))
            image_tensors |= {"patches": torch.empty(0), "global_feature": torch.empty(0)}
        return NoteBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_mask=image_mask,
            visual_index=torch.where(visual_index < 0, visual_index, visual_index + start),
            last_index=start + torch.tensor([len(e) for e in encoded]) - 1,
            has_image=torch.from_numpy(reads_image),
            **image_tensors,
        )

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the tokenizer and `processor_config.json` into `folder`."""
        self.tokenizer.save_pretrained(folder)
        settings = {
            "processor_class": type(self).__name__,
            "text": self.note_tokenizer.text.model_dump(),
            "prompt": self.prompt,
            "num_queries": self.num_queries,
            "num_patches": self.num_patches,
            "vision_width": self.vision_width,
            "padding_side": self.padding_side,
        }
        (Path(folder) / _SETTINGS_FILE).write_text(json.dumps(settings, indent=1))

    @classmethod
    def from_pretrained(cls, name: Path | str, **options: Any) -> "MLRMProcessor":
        """The processor that `save_pretrained` wrote, from a folder or the hub.

        Only the options that select a copy on the hub are used; AutoProcessor passes others, too. Raises ValueError if
        the files are missing, cannot be read or are not of this class.
        """
        hub = {key: options[key] for key in _HUB_OPTIONS if key in options}
        try:
            file = Path(str(cached_file(name, _SETTINGS_FILE, **hub)))
            settings = json.loads(file.read_text())
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub)
        except (OSError, ValueError) as e:
            reason = str(e).strip().partition("\n")[0].partition(". ")[0].rstrip(".")  # no long advice
            raise ValueError(
                f"{name} gives no processor ({reason}); name the folder of a trained model, or a hub's model."
            ) from e
        if settings.pop("processor_class", None) != cls.__name__:
            raise ValueError(f"{file} is not of a {cls.__name__}; give the folder of a trained model.")
        try:
            return cls(tokenizer, TextSettings(**settings.pop("text")), **settings)
        except (TypeError, KeyError, ValueError) as e:
            raise ValueError(f"{file} is not the configuration of a {cls.__name__} ({' '.join(str(e).split())})") from e

    def _start_of_sequence(self) -> list[int]:
        """[bos] where the tokenizer starts a text with it (LLaMA does, Qwen does not), else []."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][0] == bos else []


def require_input_kind(inputs: str) -> None:
    """Raises ValueError with the choices for an unknown kind of input."""
    if inputs not in get_args(InputKind):
        raise ValueError(f"inputs = {inputs!r}; choose one of {', '.join(get_args(InputKind))}.")


def _features(values: np.ndarray | None, reads_image: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """`values` as fp32, zeros where `reads_image` [N] is False."""
    if values is None:
        if reads_image.any():
            raise ValueError("has_image is true for some notes, but no image features are given.")
        return torch.zeros(shape)
    if values.shape != shape:
        raise ValueError(f"image features have shape {values.shape}, this model reads {shape}.")
    out = torch.zeros(shape)
    out[torch.from_numpy(reads_image)] = torch.from_numpy(values[reads_image].astype(np.float32))
    return out
