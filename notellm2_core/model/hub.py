"""Finds a trained model: in a folder, or on the hub. Imports no torch."""

from pathlib import Path

from notellm2_core.model.card import HUB_NAME
from notellm2_core.runtime.pretrained import one_line


def model_folder(
    name: str | Path,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder `name`, or a local copy of the hub's model `name`. Raises ValueError if there is neither.

    The options are those of `huggingface_hub.snapshot_download`; they do not apply to a folder.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not HUB_NAME.fullmatch(str(name)):
        raise ValueError(f"{name} is no folder; give the folder of a trained model, or a hub name like owner/model.")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(name), revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
            )
        )
    except Exception as e:  # the hub client raises its own kinds, without a common base
        raise ValueError(
            f"{name} is no folder, and the hub does not provide it ({one_line(e)}); give the folder of a trained model."
        ) from e
