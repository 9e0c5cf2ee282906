"""The gates of the data: what is compared with its own past before anything is trained on it."""

WEEK_GATES = {  # what each gate asks of the week's events
    "volume": "The week has about as many rows as the weeks before.",
    "clicks": "About the usual share of the events are clicks.",
    "views_before_clicks": "About the usual share of the clicks follow a view of the same note.",
    "hours": "The events fall on the usual hours of the day.",
    "busy_users": "Users with very many events have about their usual share of them.",
    "top_note": "The busiest note has about its usual share of the events.",
    "repeated": "No more clicks than usual repeat those of an earlier week.",
}
CONTENT_GATES = {  # and of the notes, the images and the pairs
    "related_texts": "The texts of related notes are about as alike as usual.",
    "num_notes": "There are about as many notes as there were for the releases before.",
    "text_lengths": "The texts are about as long as they were.",
    "characters": "The texts have about the characters that they had, and no more wrongly decoded ones.",
    "image_share": "About the usual share of the notes have an image.",
    "repeated_images": "About the usual share of the images belong to several notes.",
}
DATA_GATES = WEEK_GATES | CONTENT_GATES


def require_data_gate(name: str) -> str:
    """`name`, if it is a gate of the data. Raises ValueError listing the choices."""
    if name not in DATA_GATES:
        raise ValueError(f"unknown gate {name!r}; choose from {', '.join(DATA_GATES)}")
    return name
