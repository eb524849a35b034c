"""Samples to look at before training: their text, with what is trained told apart."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .samples import IGNORE_INDEX, Sample


@dataclass(frozen=True)
class SamplePreview:
    """One tokenized sample as text.

    Attributes:
        tokens: How many there are.
        trained: How many of them are predicted and count in the loss.
        runs: The text in its order, as pairs of a stretch and whether it is trained.
    """

    tokens: int
    trained: int
    runs: list[tuple[str, bool]]

    @classmethod
    def of(cls, sample: Sample, tokenizer: PreTrainedTokenizerBase, repeated: int | None = None) -> SamplePreview:
        """The preview of a sample. A token is trained where its label is set; the first one is never predicted.

        Args:
            sample: Tokenized.
            tokenizer: Its tokenizer.
            repeated: A token that stands for an image many times in a row, of which the text says how many.
        """
        trained = [False, *(label != IGNORE_INDEX for label in sample["labels"][1:])]
        runs = []
        for is_trained, pairs in itertools.groupby(zip(trained, sample["input_ids"], strict=True), key=lambda p: p[0]):
            text = ""
            for is_image, tokens in itertools.groupby(
                (token for _, token in pairs), key=lambda token: token == repeated
            ):
                ids = list(tokens)
                shown = tokenizer.decode(ids[:1] if is_image else ids, clean_up_tokenization_spaces=False)
                text += f"{shown} x {len(ids)} " if is_image and len(ids) > 1 else str(shown)
            runs.append((text, is_trained))
        return cls(len(trained), sum(trained), runs)

    def text(self, color: bool) -> str:
        """For a terminal: what is trained in green, or else between ``[[`` and ``]]``."""
        opening, closing = ("\x1b[32m", "\x1b[0m") if color else ("[[", "]]")
        return "".join(f"{opening}{run}{closing}" if is_trained else run for run, is_trained in self.runs)


def print_previews(previews: list[SamplePreview]) -> None:
    """Print samples, with what is trained in green where the terminal shows colours."""
    color = sys.stdout.isatty()
    how = "in green" if color else "between [[ and ]]"
    for number, preview in enumerate(previews, start=1):
        print(f"--- sample {number}: {preview.trained} of {preview.tokens} tokens are trained, shown {how}")
        print(preview.text(color), flush=True)
