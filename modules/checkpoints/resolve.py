"""From what a user calls a model to a local directory of safetensors: path, GGUF file, hub name or the demo model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from .config import read_config
from .demo_model import DEMO_MODEL, demo_model_directory
from .gguf import convert_gguf, parts_of
from .safetensors_files import SafetensorsCheckpoint, how_to_convert


@dataclass(frozen=True)
class ModelOptions:
    """Base model.

    Args:
        model: The demo model (smollm2-135m-instruct), a transformers directory (16-bit or bitsandbytes 4-bit
            safetensors), a GGUF file (of a split one, any part), or a name on the Hugging Face hub.
    """

    model: str = DEMO_MODEL

    def directory(self) -> Path:
        """As :func:`resolve_model`."""
        return resolve_model(self.model)


def resolve_model(model: str | Path) -> Path:
    """A local directory with ``config.json``, safetensors weights and a tokenizer for ``model``.

    A GGUF file (or a directory with one and no ``config.json``) is converted to 16-bit safetensors once and cached by
    content; the parts of a split one are joined. Safe to call from several processes at a time.

    Args:
        model: :data:`DEMO_MODEL`, a transformers directory, a GGUF file, or a name on the Hugging Face hub.

    Raises:
        ValueError: If there is no such model, or it has no configuration or weights.
    """
    path = Path(model)
    if str(model) == DEMO_MODEL and not path.exists():
        directory = demo_model_directory()
    elif path.suffix == ".gguf":
        directory = convert_gguf(path)
    elif path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not (path / "config.json").is_file():
            if ggufs != parts_of(ggufs[0]):
                raise ValueError(f"{path} holds {len(ggufs)} GGUF files: name one of them, e.g. {ggufs[0]}.")
            directory = convert_gguf(ggufs[0])
        else:
            directory = path
    elif path.exists():
        raise ValueError(f"{path} is neither a model directory nor a GGUF file.")
    else:
        directory = _download(str(model))
    read_config(directory)
    SafetensorsCheckpoint(directory).close()
    return directory


def base_name(model: str | Path, directory: Path) -> str:
    """How an adapter should name its base, so that transformers finds it from any working directory.

    Returns:
        The hub name, or the absolute path of the local directory.
    """
    is_local = Path(model).exists() or str(model) == DEMO_MODEL
    return str(directory.resolve()) if is_local else str(model)


def _download(name: str) -> Path:
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"There is no model directory or GGUF file {name!r}.")
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        directory = Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types: offline, unknown, gated, malformed name
        raise ValueError(
            f"Model {name!r} is neither a local directory or GGUF file nor could it be fetched from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name, the network, and your "
            "access if it is gated."
        ) from error
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"{name} on the hub has no config.json: it is no transformers model. If it holds GGUF files, download one "
            f"(hf download {name} FILE.gguf --local-dir .) and pass --model FILE.gguf."
        )
    if not any(directory.glob("*.safetensors")):
        raise ValueError(f"{name} on the hub holds no safetensors. {how_to_convert(name)}")
    return directory
