"""Where the log of a configuration is."""

from pathlib import Path

from notellm2_core.config.settings import Config
from notellm2_core.lake.ledger import Ledger


def log_url(config: Config, ledger: Ledger, url: str | None = None) -> str:
    """The URL of the log of notes: `url`, or else that of the configuration, or else of a file beside the ledger."""
    return url or config.serving.log or f"sqlite:///{(ledger.folder / 'notes.db').absolute()}"


def may_exist(url: str) -> bool:
    """Whether there may be a log: not where it would be a file that is missing. To open it would make it."""
    scheme, _, path = url.partition(":///")
    return scheme != "sqlite" or Path(path).exists()
