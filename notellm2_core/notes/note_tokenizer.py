"""A note's text -> the LLM's tokens, field by field, so independent of the prompt around the fields."""

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

# Text that tokenizers split in different ways: contractions, numbers, accents, case, scripts, emoji, links.
_PROBE = (
    "It's 3,141.59 % na\u00efve don't RE-do\nthis; \u4e2d\u6587\u7b14\u8bb0 \u3072\u3089 \ud55c\uae00 "
    "\u0410\u0431 \u0645\u0631 \U0001f98a #a @b http://c.d/e?f=g"
)


class FieldTokens(NamedTuple):
    """Token ids of a note's fields, [T_f] int32 each, after truncation and escaping."""

    title: np.ndarray
    topic: np.ndarray
    content: np.ndarray


class NoteTokenizer:
    """The LLM's tokenizer with the two special tokens of the prompts, and the settings that truncate the fields."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: TextSettings) -> None:
        """Adds the special tokens to `tokenizer` where it lacks them."""
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, VISUAL_WORD_TOKEN]}, False)
        self.tokenizer = tokenizer
        self.text = text
        new_token_ids = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, VISUAL_WORD_TOKEN])
        assert isinstance(new_token_ids, list)
        self.new_token_ids = new_token_ids
        self.special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}

    def tokenize(self, notes: Sequence[Note]) -> list[FieldTokens]:
        """The tokens of each note's fields."""
        fields = []
        for name in get_args(FieldName):
            max_tokens = max_field_tokens(name, self.text)
            ids = self.ids([field_text(note, name, self.text) for note in notes])
            fields.append([np.array(i[:max_tokens], dtype=np.int32) for i in ids])
        return [FieldTokens(*note_fields) for note_fields in zip(*fields, strict=True)]

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of plain texts. The name of a special token is read as text, so a note cannot inject one."""
        ids_of_texts = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        # Not all tokenizers implement split_special_tokens.
        return [[i for i in ids if i not in self.special_ids] for ids in ids_of_texts]

    @cached_property
    def tokens_id(self) -> str:
        """Fingerprint of the tokenisation: vocabulary, the tokens of a probe text, settings.

        Equal ids mean equal tokens.
        """
        note = Note("", _PROBE, (_PROBE,), _PROBE)
        probe_tokens = [field.tolist() for field in self.tokenize([note])[0]]
        settings = [*WordSettings.of(self.text).model_dump().values()]
        return fingerprint([sorted(self.tokenizer.get_vocab().items()), probe_tokens, settings])
