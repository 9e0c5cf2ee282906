"""What the service takes and answers, as JSON: the bodies of its routes, with their limits."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Base64Bytes, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict

from notellm2_core.config.methods import InputKind

MAX_K, MAX_HISTORY, MAX_EXCLUDED, MAX_ID, MAX_EVENTS = 1000, 500, 10_000, 128, 1000
MAX_TEXT, MAX_TOPICS = 100_000, 100
MAX_TIME = 4_102_444_800  # 2100-01-01


def _printable(text: str) -> str:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("it has a NUL or a lone surrogate")
    return text


def _id_of_a_path(note_id: str) -> str:
    if "/" in note_id or note_id in (".", ".."):
        raise ValueError("an id that is written here has no '/', and is neither '.' nor '..': it is part of an address")
    return note_id


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_PRINTABLE = AfterValidator(_printable)
_PRINTABLE_OR_NULL = AfterValidator(lambda text: None if text is None else _printable(text))
WHOLE = BeforeValidator(_whole)  # the last of its annotations: limits before it are part of the schema
_NO_NUL: JsonDict = {"pattern": r"^[^\u0000]*$"}
_OF_A_PATH: JsonDict = {"pattern": r"^(?!\.{1,2}$)[^/\u0000]+$"}
NoteId = Annotated[
    str,
    Field(min_length=1, max_length=MAX_ID, examples=["n00042"], json_schema_extra=_NO_NUL),
    _PRINTABLE,
]
WrittenId = Annotated[NoteId, Field(json_schema_extra=_OF_A_PATH), AfterValidator(_id_of_a_path)]
K = Annotated[int, Field(ge=1, le=MAX_K, description="Number of hits."), WHOLE]
Inputs = Annotated[InputKind, Field(description="What the model reads of the query.")]
ReleaseId = Annotated[
    str | None, Field(max_length=MAX_ID, description="One of those in memory; by default the one that answers.")
]
MinSeq = Annotated[int, Field(ge=0, description="Answer only once the log is known up to this place."), WHOLE]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


_TEXT: JsonDict = {"type": "string", "pattern": r"\S"}


def _not_empty(text: JsonDict, image: JsonDict) -> JsonDict:
    """The schema of a note with a text or a picture, for readers: the routes refuse others.

    text, image: schemas of the other fields that a text, or a picture, is enough for.
    """
    return {
        "anyOf": [
            {"required": ["title"], "properties": {"title": _TEXT, **text}},
            {"required": ["content"], "properties": {"content": _TEXT, **text}},
            {"required": ["topics"], "properties": {"topics": {"minItems": 1, "items": _TEXT}, **text}},
            {"required": ["image"], "properties": {"image": {"type": "string"}, **image}},
        ]
    }


class NoteText(Body):
    """The text and the picture of a note; at least one of them."""

    model_config = ConfigDict(json_schema_extra=_not_empty({}, {}))

    title: Annotated[str, Field(max_length=MAX_TEXT, json_schema_extra=_NO_NUL)] = ""
    topics: Annotated[
        list[Annotated[str, Field(max_length=1000, json_schema_extra=_NO_NUL)]], Field(max_length=MAX_TOPICS)
    ] = []
    content: Annotated[str, Field(max_length=MAX_TEXT, json_schema_extra=_NO_NUL)] = ""
    image: Annotated[
        Base64Bytes | None, Field(strict=False, min_length=1, description="The bytes of the picture, in base64.")
    ] = None


class NewNote(NoteText):
    """A note to be written."""

    note_id: WrittenId
    version: Annotated[
        int | None, Field(ge=0, lt=2**63, description="An older version never replaces a newer one."), WHOLE
    ] = None


class SimilarRequest(NoteText):
    """A note that is not stored."""

    model_config = ConfigDict(
        json_schema_extra=_not_empty(
            {"inputs": {"enum": ["multimodal", "text"]}}, {"inputs": {"enum": ["multimodal", "image"]}}
        )
    )

    k: K = 10
    inputs: Inputs = "multimodal"
    exclude: Annotated[list[NoteId], Field(max_length=MAX_EXCLUDED)] = []
    min_seq: MinSeq = 0
    release: ReleaseId = None


class HistoryNote(Body):
    note_id: NoteId
    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0


class RecallRequest(Body):
    """A user's history."""

    history: Annotated[list[NoteId | HistoryNote], Field(min_length=1, max_length=MAX_HISTORY)]
    user_id: Annotated[NoteId | None, Field(description="Whose it is: an experiment chooses by it.")] = None
    k: K = 100
    merge: Literal["max", "sum", "rrf"] = "max"
    exclude: Annotated[list[NoteId], Field(max_length=MAX_EXCLUDED)] = []
    min_seq: MinSeq = 0
    release: ReleaseId = None
    deadline_ms: Annotated[int, Field(ge=1, le=60_000, description="After it, the answer is partial."), WHOLE] = 1000


class NewEvent(Body):
    """A user saw a note, or did something with it."""

    user_id: NoteId
    note_id: NoteId
    event: Annotated[
        str, Field(min_length=1, max_length=MAX_ID, examples=["view", "click"], json_schema_extra=_NO_NUL), _PRINTABLE
    ]
    timestamp: Annotated[float | None, Field(ge=0, le=MAX_TIME, description="Unix time in seconds; null: now.")] = None
    answer: Annotated[
        str | None,
        Field(max_length=64, description="`answer` of the recall that showed it.", json_schema_extra=_NO_NUL),
        _PRINTABLE_OR_NULL,
    ] = None
    release: Annotated[
        str | None,
        Field(max_length=MAX_ID, description="`release` of the hit, or of the answer.", json_schema_extra=_NO_NUL),
        _PRINTABLE_OR_NULL,
    ] = None
    event_id: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=64,
            description="Yours. An event that is sent again with it within a month counts once.",
            json_schema_extra=_NO_NUL,
        ),
        _PRINTABLE_OR_NULL,
    ] = None


class NewEvents(Body):
    """Events, at most a thousand at a time."""

    events: Annotated[list[NewEvent], Field(min_length=1, max_length=MAX_EVENTS)]


class EventsAnswer(Body):
    kept: int = Field(description="Events that are on the disk now.")
    repeated: int = Field(description="Those of them that were there already, by their ids.")


class HitAnswer(Body):
    note_id: str
    score: float
    because: list[str] = Field([], description="The history notes that found it.")
    release: str | None = Field(None, description="The release that found it, where two are interleaved.")


class SearchAnswer(Body):
    """Hits, the best first."""

    answer: str | None = Field(None, description="Its id, of a recall: events about its hits name it.")
    release: str
    seq: int = Field(description="The log was known up to this place.")
    hits: list[HitAnswer]
    unknown: list[str] = []
    partial: bool = False


class WriteAnswer(Body):
    note_id: str
    release: str
    seq: int
    version: int
    applied: bool = Field(description="False: it was there already, or a newer version is.")
    image: str | None = Field(None, description="What became of the picture.")


class NoteAnswer(Body):
    note_id: str
    release: str
    seq: int | None = Field(description="Its place in the log; null: it is of the release.")
    version: int | None
    title: str
    topics: list[str]
    content: str
    not_found_because: str | None = Field(None, description="Why searches do not find it, where they do not.")


class Problem(Body):
    """RFC 9457: what is wrong, in one sentence."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
