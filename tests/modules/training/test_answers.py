"""Answers to many prompts: those that each gets by itself, on one rank and on two that share a sharded model."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
from lightning.pytorch.callbacks import Callback

from lightning_qlora.modules.checkpoints.chat_format import ChatFormat
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM
from lightning_qlora.modules.training.generation import generate_answer
from tests.distributed import RankPools, build
from tests.modules.training.test_causal_lm import batch, loader

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = ["what is a thing?", "name", "what is the name of the thing that is a thing?"]


class Ask(Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: QLoRACausalLM) -> None:
        chat_format = ChatFormat.of(pl_module.model_dir)
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        prompts = [
            str(chat_format.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
            for chat in chats
        ]
        self.together = pl_module.complete(prompts, 12, batch_size=2)
        self.none = pl_module.complete([], 12)
        assert pl_module.training
        pl_module.eval()
        self.alone = [
            generate_answer(pl_module.model, chat_format, chat, device=pl_module.device, max_new_tokens=12)
            for chat in chats
        ]
        pl_module.train()


def answers(model_dir: Path, root: Path, strategy: str, devices: int) -> dict[str, Any]:
    ask = Ask()
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=build(strategy), max_steps=1, logger=False, callbacks=[ask],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
        inference_mode=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(QLoRACausalLM(model_dir, default_lora(4)), loader(batch([6], 1)))
    return {"together": ask.together, "alone": ask.alone, "none": ask.none}


@pytest.mark.usefixtures("no_group_left")
def test_prompts_of_any_length_together_get_the_answers_that_each_gets_alone(tiny_llama_dir, tmp_path):
    found = answers(tiny_llama_dir, tmp_path, "single", 1)
    assert found["together"] == found["alone"]
    assert len({*found["alone"]}) == len(QUESTIONS)
    assert found["none"] == []


def test_the_ranks_of_a_sharded_model_share_the_prompts_and_know_all_answers(
    ranks: RankPools, tiny_llama_dir, tmp_path
):
    """Three prompts for two ranks: the second does one again, so that both take part in as many forwards."""
    first, second = ranks.run(2, "cpu", answers, tiny_llama_dir, tmp_path, "fsdp2", 2, timeout=120)
    assert first == second
    assert first["together"] == first["alone"]
