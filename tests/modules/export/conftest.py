"""Models to export as GGUF files."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.modules.export.gguf_models import SENTENCEPIECE, save_model, save_sentencepiece


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """``model(model_type, **options)``: a directory with random weights and a tokenizer of the family's kind."""

    def save(model_type: str, sentencepiece: bool | None = None, **options: Any) -> Path:
        directory = save_model(tmp_path / "model", model_type, **options)
        if model_type in SENTENCEPIECE if sentencepiece is None else sentencepiece:
            save_sentencepiece(directory, prefix=not model_type.startswith("gemma"))
        else:
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(tiny_llama_dir / name, directory)
        return directory

    return save
