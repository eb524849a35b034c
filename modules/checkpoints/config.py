"""Reading ``config.json`` of a transformers model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_config(directory: str | Path) -> dict[str, Any]:
    """The contents of ``config.json``.

    Raises:
        ValueError: If there is none, or it is not a JSON object.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json: it is not a transformers model directory.")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a JSON object but a {type(raw).__name__}.")
    return raw
