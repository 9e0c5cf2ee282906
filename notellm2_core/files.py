"""Files that need no second copy."""

import os
import shutil
from pathlib import Path


def link_or_copy(source: Path, target: Path) -> None:
    """`target` with the content of `source`: a hard link where the file system can, else a copy."""
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        raise
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, target)
