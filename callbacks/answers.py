"""Show what training changed: the same prompts answered before and after it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]
from typing_extensions import override


class CompareAnswers(Callback):
    """Prints ``pl_module.answer(prompt)`` for each prompt when training starts, and again beside it when it ends.

    A module that has ``answers(prompts, max_new_tokens)`` too makes them all in one batch.

    The answers before training are part of every checkpoint, so that a resumed run still shows the untrained model's.
    All ranks call ``answer`` together; rank 0 prints.

    Args:
        examples: Prompts to ask, each with the answer that the data give, or ``None``.
        max_new_tokens: Longest answer, in tokens.
        is_good: Tells whether an answer is as it should be, e.g. has a form. How many are is printed and reported.
        shown: How many answers are printed in full; ``None`` for all.

    Raises:
        TypeError: Before training, if the module has no ``answer`` method.
    """

    report_key = "answers"

    def __init__(
        self,
        examples: Sequence[tuple[str, str | None]],
        max_new_tokens: int = 64,
        *,
        is_good: Callable[[str], bool] | None = None,
        shown: int | None = None,
    ) -> None:
        super().__init__()
        self.is_good, self.shown = is_good, shown
        self.prompts = [prompt for prompt, _ in examples]
        self.references = [reference for _, reference in examples]
        self.max_new_tokens = max_new_tokens
        self.before: list[str] = []
        self.after: list[str] = []

    def report_section(self) -> dict[str, Any] | None:
        """For ``RunReport``: prompts, the answers known so far, and with ``is_good`` which share of them is good."""
        if not self.prompts:
            return None
        section: dict[str, Any] = {"prompts": self.prompts, "before": self.before, "after": self.after}
        if self.is_good is not None:
            section |= {f"good_{when}": self._share(section[when]) for when in ("before", "after") if section[when]}
        return section

    def _share(self, answers: list[str]) -> float:
        assert self.is_good is not None
        return sum(map(self.is_good, answers)) / len(answers)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "before": self.before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["prompts"] == self.prompts:
            self.before = state_dict["before"]

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not callable(getattr(pl_module, "answer", None)):
            raise TypeError(
                f"CompareAnswers needs {type(pl_module).__name__} to have a method answer(prompt, max_new_tokens)."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not self.before:
            self.before = self._ask(pl_module)
            self._show("before training", self.before)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.after = self._ask(pl_module)
        self._show("after training", self.after)

    def _ask(self, pl_module: Any) -> list[str]:
        if self.prompts and callable(getattr(pl_module, "answers", None)):
            return list(pl_module.answers(self.prompts, self.max_new_tokens))
        return [pl_module.answer(prompt, self.max_new_tokens) for prompt in self.prompts]

    @rank_zero_only
    def _show(self, when: str, answers: list[str]) -> None:
        for index, (prompt, answer) in enumerate([*zip(self.prompts, answers, strict=True)][: self.shown]):
            print(f"\n--- {when} ---\nprompt: {prompt}\nanswer:\n{textwrap.indent(answer, '    ')}")
            if (reference := self.references[index]) and answers is self.after:
                print(f"the data say:\n{textwrap.indent(reference, '    ')}")
            print(flush=True)
        if self.is_good is not None and answers:
            good, before = self._share(answers), ""
            if answers is self.after:
                before = f"; before training {self._share(self.before):.0%}"
            print(f"Good answers {when}: {good:.0%} of {len(answers)}{before}", flush=True)
