"""The tokenizer of a model directory."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

#: Files of which a tokenizer has at least one: as ``tokenizers``, sentencepiece and byte-level BPE write it.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


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


def find_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a directory; ``None`` for one without ``tokenizer_config.json``, as random weights have.

    Raises:
        ValueError: If transformers cannot read it.
    """
    return load_tokenizer(directory) if (Path(directory) / "tokenizer_config.json").is_file() else None
