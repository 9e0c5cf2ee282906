"""A module for a fork server to import. It sets a variable, as torch_compat does."""

import os

os.environ.setdefault("SET_BY_IMPORT", "128")
