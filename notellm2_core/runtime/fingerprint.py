"""Stable names of values."""

import hashlib
import json
from typing import Any


def fingerprint(parts: Any) -> str:
    """A stable 16-digit name for a JSON-able value."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
