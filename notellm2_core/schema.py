"""The columns and file names of every dataset, in the order of the data flow. All code takes them from here.

The tables that the user brings are described in `notellm2_core.tables.source`.

Imports only pyarrow, so that `spark_jobs` and the asset processes need no torch. Raise `SCHEMA_VERSION` whenever a
column changes its name, type or meaning: older lakes are then refused with one sentence instead of being misread.
"""

import pyarrow as pa

SCHEMA_VERSION = 2

# --- lake: notes and events -----------------------------------------------------------------------------------------
NOTES = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("topics", pa.list_(pa.string()), nullable=False),
        pa.field("content", pa.string(), nullable=False),
        pa.field("image_path", pa.string()),  # relative to the source folder; null: bytes in `image`, or no image
        pa.field("image", pa.binary()),  # encoded bytes, where the source has them in the table
    ]
)
POSTED = pa.schema(  # the notes of the log of a service
    [
        NOTES.field("note_id"),
        pa.field("deleted", pa.bool_(), nullable=False),  # then it is in no release, whatever the source says
        *(NOTES.field(name) for name in ("title", "topics", "content", "image")),
    ]
)
EVENTS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("timestamp", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("event", pa.string(), nullable=False),
    ]
)
INTERACTIONS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("first_view", pa.timestamp("us", tz="UTC"), nullable=False),  # a click is a view, too
        pa.field("last_click", pa.timestamp("us", tz="UTC")),  # null: not clicked
        pa.field("events", pa.int64(), nullable=False),
        pa.field("clicks", pa.int64(), nullable=False),  # the clicks among these events
    ]
)
CLICK_WEIGHT = pa.field("click_weight", pa.float64())  # in INTERACTIONS if clicks have weights; null: no click
# Dropped rows with the reason: the source's row or, for robots and unknown notes, the interaction.
QUARANTINE = pa.schema([pa.field("reason", pa.string(), nullable=False), pa.field("row", pa.string(), nullable=False)])

# --- lake: tokens ---------------------------------------------------------------------------------------------------
NOTE_TOKENS = pa.schema(  # token ids of each field after truncation and escaping
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("title", pa.large_list(pa.int32()), nullable=False),
        pa.field("topic", pa.large_list(pa.int32()), nullable=False),
        pa.field("content", pa.large_list(pa.int32()), nullable=False),
    ]
)

# --- lake: pairs ----------------------------------------------------------------------------------------------------
NOTE_SPLIT = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("side", pa.string(), nullable=False),  # the split: "train" | "pool", the candidate pool of the test
        pa.field("group_id", pa.string(), nullable=False),  # near-duplicates share it; a group is in one split
        pa.field("in_train_days", pa.bool_(), nullable=False),  # has an interaction in the training days; else cold
    ]
)
POOL = pa.schema([NOTE_SPLIT.field("note_id"), NOTE_SPLIT.field("in_train_days")])
SCORES = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("target_id", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),  # Eq. 2
        pa.field("num_users", pa.int64(), nullable=False),  # |U(query -> target)|
    ]
)
TARGET_CLICKS = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("num_users", pa.int64(), nullable=False),  # distinct users who clicked the note in the window
    ]
)
RELATED_PAIRS = SCORES.append(pa.field("rank", pa.int32(), nullable=False))  # 1 = the highest score of its query
HARD_NEGATIVES = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("negative_id", pa.string(), nullable=False),
        pa.field(
            "rank", pa.int32(), nullable=False
        ),  # 1 = the nearest other note; with gaps where a note is no negative
    ]
)

# --- lake: images ---------------------------------------------------------------------------------------------------
NOTE_IMAGES = pa.schema(
    [
        pa.field("note_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string()),  # sha256 of the encoded bytes; null: no usable image
        pa.field("perceptual_hash", pa.string()),  # vision.images.perceptual_hash; null: none
        pa.field("status", pa.string(), nullable=False),  # one of vision.image_status.STATUSES
    ]
)


def vision_features(num_patches: int, width: int) -> pa.Schema:
    """Columns of the feature store: patch features `[num_patches * width]` and the global feature `[width]`, fp16.

    The perceptual hash is among them because it also needs the decoded image.
    """
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("perceptual_hash", pa.string()),
            pa.field("patches", pa.list_(pa.float16(), num_patches * width), nullable=False),
            pa.field("global_feature", pa.list_(pa.float16(), width), nullable=False),
        ]
    )


def embeddings(dim: int) -> pa.Schema:
    """Columns of an embedding shard: unit vectors `[dim]` in fp32."""
    return pa.schema(
        [
            pa.field("note_id", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(pa.float32(), dim), nullable=False),
        ]
    )


# --- the files of each dataset; a table is a folder of Parquet ------------------------------------------------------
POSTED_NOTES = "posted_notes"  # the name of a dataset that is made of the log of a service
POSTED_FILE = "posted.parquet"  # in it: POSTED
NOTES_TABLE = "notes"  # in notes: NOTES
QUARANTINE_TABLE = "quarantine"  # in notes and interactions: QUARANTINE
TRAIN, VALIDATION, TEST = "train", "validation", "test"  # tables of datasets that have windows or splits
TRAIN_CLICKS, TEST_CLICKS = "train_clicks", "test_clicks"  # in cooccurrence: TARGET_CLICKS
SPLIT_TABLE = "sides"  # in note_split: NOTE_SPLIT
POOL_TABLE = "pool"  # in pair_datasets: POOL
NOTE_IMAGES_FILE = "note_images.parquet"  # in vision_features: NOTE_IMAGES
VISION_FOLDER = "vision"  # in vision_features and in every model: the vision encoder
TOKENS_FILE = "tokens.arrow"  # in note_tokens: NOTE_TOKENS
COUNTS_FILE = "counts.json"  # the counts of a command
INDEX_FOLDER = "index"  # in faiss_index and release
NEIGHBOURS_FOLDER = "neighbours"  # in faiss_index and release: the table of each note's neighbours
GOLDEN_FILE = "golden.json"  # in canary and release: queries with their answers
DAYS_FILE = "days.json"  # in raw_events: rows by day
