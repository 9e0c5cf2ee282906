"""Stable hashes of values."""

import hashlib
import json
from typing import Any


def fingerprint(parts: Any) -> str:
    """The first 16 hex digits of the SHA-256 of a value's JSON, which is independent of the order of keys."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
