"""The online phase: notes that are written now are found now."""
