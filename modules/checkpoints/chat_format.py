"""How a model is talked to: its chat template, and the tokens at which it stops. Both may change with finetuning.

Beside an adapter, ``chat_template.jinja`` and ``generation_config.json`` hold what training changed, under the names
that transformers reads. Merging takes them over from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from transformers import PreTrainedTokenizerBase

from .tokenizer import load_tokenizer

TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class ChatFormat:
    """How a model is talked to.

    Attributes:
        tokenizer: With the chat template.
        stops: Tokens at which generation stops: ``eos_token_id`` of ``generation_config.json``, in its order.
        changed: Files that must be saved beside an adapter, by name, because they differ from the base model's.
    """

    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]
    changed: dict[str, str]

    @classmethod
    def of(cls, directory: str | Path, adapter: str | Path | None = None) -> ChatFormat:
        """That of a model's directory, with what an adapter's training changed.

        Raises:
            ValueError: If the tokenizer cannot be loaded.
        """
        tokenizer = load_tokenizer(directory)
        changed = {} if adapter is None else read_changes(adapter)
        if TEMPLATE_FILE in changed:
            tokenizer.chat_template = changed[TEMPLATE_FILE]
        config = json.loads(changed[GENERATION_FILE]) if GENERATION_FILE in changed else _generation_config(directory)
        return cls(tokenizer, _stops(config), changed)

    def trained(
        self, directory: str | Path, tokenizer: PreTrainedTokenizerBase, turn_ends: Iterable[int]
    ) -> ChatFormat:
        """That of the model after training, and say what changes.

        Args:
            directory: Of the base model.
            tokenizer: With the chat template of the training data.
            turn_ends: The tokens that the trained turns end with.
        """
        changed = dict(self.changed)
        if tokenizer.chat_template != self.tokenizer.chat_template:
            changed[TEMPLATE_FILE] = str(tokenizer.chat_template)
            rank_zero_info("The chat template is not the base model's: it is saved beside the adapter.")
        stops = (*self.stops, *(token for token in turn_ends if token not in self.stops))
        if added := stops[len(self.stops) :]:
            rank_zero_info(
                f"The data end answers with {_named(tokenizer, added)}, but the model stops at "
                f"{_named(tokenizer, self.stops)} (the tokenizer's eos_token is {tokenizer.eos_token!r}): it would not "
                "stop. The token is added to eos_token_id in generation_config.json, which is saved beside the adapter "
                "and in merged models."
            )
            config = _generation_config(directory) | {"eos_token_id": list(stops) if len(stops) > 1 else stops[0]}
            changed[GENERATION_FILE] = json.dumps(config, indent=2, sort_keys=True) + "\n"
        return ChatFormat(tokenizer, stops, changed)

    def save(self, directory: str | Path) -> None:
        """Write the files that differ from the base model's into an adapter's or a merged model's directory."""
        for name, text in self.changed.items():
            (Path(directory) / name).write_text(text, encoding="utf-8")


def read_changes(adapter: str | Path) -> dict[str, str]:
    """The files beside an adapter that replace those of its base model, by name."""
    paths = [Path(adapter) / name for name in (TEMPLATE_FILE, GENERATION_FILE)]
    return {path.name: path.read_text(encoding="utf-8") for path in paths if path.is_file()}


def copy_changes(adapter: str | Path, model: str | Path) -> None:
    """Write what training changed in how the model is talked to from an adapter's directory into a merged model's."""
    for name, text in read_changes(adapter).items():
        (Path(model) / name).write_text(text, encoding="utf-8")


def _generation_config(directory: str | Path) -> dict[str, Any]:
    """What transformers generates with: ``generation_config.json``, or else the tokens that ``config.json`` names."""
    path = Path(directory) / GENERATION_FILE
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config.get(name) is not None}


def _stops(config: dict[str, Any]) -> tuple[int, ...]:
    stops = config.get("eos_token_id")
    return () if stops is None else (stops,) if isinstance(stops, int) else tuple(stops)


def _named(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in tokens) or "no token"
