"""A cure for a CPU build of torch beside a CUDA build of torchvision. Import it before transformers, timm or open_clip.

Such a torchvision (the one PyPI has) cannot load its own library, and `import torchvision` dies with "operator
torchvision::nms does not exist". Nothing here detects boxes, so declaring the two operators' names is enough. Where
the real operators can be loaded, nothing is done.
"""

import importlib.util
from pathlib import Path

import torch

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _torchvision_library_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # nothing to cure
    libraries = sorted(Path(spec.origin).parent.glob("_C*.so"))
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError:  # built for a CUDA runtime that is not here
        return False
    return True


def declare_missing_operators() -> torch.library.Library | None:
    """Declare `torchvision::nms` and `qnms` if the real ones cannot be had; returns what must stay alive."""
    if _torchvision_library_loads():
        return None
    library = torch.library.Library("torchvision", "DEF")
    library.define(f"nms{_NMS}")
    library.define(f"qnms{_NMS}")
    return library


_library = declare_missing_operators()
