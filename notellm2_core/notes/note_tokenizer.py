"""A note's text -> the LLM's tokens, field by field and whatever the prompt around them."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, get_args

import notellm2_core.runtime.torch_compat  # noqa: F401, before transformers

# isort: split
import numpy as np
from transformers import PreTrainedTokenizerBase

from notellm2_core.config.data import TextSettings, WordSettings
from notellm2_core.notes.note import Note
from notellm2_core.notes.prompts import IMAGE_TOKEN, VISUAL_WORD_TOKEN, FieldName, field_text, max_field_tokens
from notellm2_core.runtime.fingerprint import fingerprint

# Whatever tokenizers are known to treat in ways of their own.
_PROBE = (
    "It's 3,141.59 % na\u00efve don't RE-do\nthis; \u4e2d\u6587\u7b14\u8bb0 \u3072\u3089 \ud55c\uae00 "
    "\u0410\u0431 \u0645\u0631 \U0001f98a #a @b http://c.d/e?f=g"
)


class FieldTokens(NamedTuple):
    """The tokens of a note's text, int32 each, as its fields are read: truncated and escaped."""

    title: np.ndarray
    topic: np.ndarray
    content: np.ndarray


class NoteTokenizer:
    """The LLM's tokenizer with the two special tokens of the prompts, and how much of each field is read."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: TextSettings) -> None:
        """Adds the special tokens to `tokenizer` where it does not have them."""
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, VISUAL_WORD_TOKEN]}, False)
        self.tokenizer = tokenizer
        self.text = text
        new_token_ids = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, VISUAL_WORD_TOKEN])
        assert isinstance(new_token_ids, list)
        self.new_token_ids = new_token_ids
        self.special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}

    def tokenize(self, notes: Sequence[Note]) -> list[FieldTokens]:
        """The tokens of the fields of each of `notes`."""
        fields = []
        for name in get_args(FieldName):
            most = max_field_tokens(name, self.text)
            ids = self.ids([field_text(note, name, self.text) for note in notes])
            fields.append([np.array(i[:most], dtype=np.int32) for i in ids])
        return [FieldTokens(*of_note) for of_note in zip(*fields, strict=True)]

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of plain texts: what looks like a special token is spelled out, so none can be smuggled in."""
        found = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        # For tokenizers that do not know how to split them.
        return [[i for i in ids if i not in self.special_ids] for ids in found]

    @cached_property
    def tokens_id(self) -> str:
        """Equal where `tokenize` gives the same tokens: of the vocabulary, how it is used, and the text settings."""
        note = Note("", _PROBE, (_PROBE,), _PROBE)
        used = [field.tolist() for field in self.tokenize([note])[0]]
        settings = [*WordSettings.of(self.text).model_dump().values()]
        return fingerprint([sorted(self.tokenizer.get_vocab().items()), used, settings])
