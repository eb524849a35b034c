"""Answers before and after training: in one batch where the module can, and how many of them are good."""

from typing import Any

import lightning.pytorch as pl

from lightning_qlora.callbacks import CompareAnswers


class Module(pl.LightningModule):
    """Answers "good" to prompts below a number, which training raises."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.calls = 1, 0

    def answer(self, prompt: str, max_new_tokens: int) -> str:
        return self.answers([prompt], max_new_tokens)[0]

    def answers(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        self.calls += 1
        return ["good" if int(prompt) < self.known else "bad" for prompt in prompts]


def test_the_share_of_good_answers_is_printed_and_reported(capsys: Any) -> None:
    callback = CompareAnswers(
        [(str(number), None) for number in range(4)], is_good=lambda answer: answer == "good", shown=1
    )
    module, trainer = Module(), pl.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
    callback.setup(trainer, module, "fit")
    callback.on_train_start(trainer, module)
    module.known = 3
    callback.on_train_end(trainer, module)
    printed = capsys.readouterr().out
    assert "Good answers before training: 25% of 4\n" in printed
    assert "Good answers after training: 75% of 4; before training 25%\n" in printed
    assert printed.count("prompt: ") == 2
    assert module.calls == 2
    section = callback.report_section()
    assert section is not None
    assert (section["good_before"], section["good_after"]) == (0.25, 0.75)
    assert section["after"] == ["good", "good", "good", "bad"]
