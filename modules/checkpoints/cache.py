"""Where downloads and conversions are kept."""

from __future__ import annotations

import os
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
