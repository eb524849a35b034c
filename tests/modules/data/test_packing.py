"""First-fit decreasing against packings worked out by hand, its definition and its proven bound; training on packs."""

import random
from collections.abc import Callable
from itertools import pairwise
from math import ceil
from pathlib import Path
from time import process_time
from typing import Any

import lightning.pytorch as L
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lightning_qlora.modules.data.data_module import ChatDataModule
from lightning_qlora.modules.data.packing import pack_samples
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM


@pytest.mark.parametrize(
    ("lengths", "packs"),
    [
        ([], []),
        ([10], [[0]]),
        ([10, 10], [[0], [1]]),
        ([1, 2, 3, 4], [[3, 2, 1, 0]]),
        # The order of the samples does not matter but among equals: 7 + 3, 6 + 4, 5 + 5.
        ([3, 5, 6, 4, 5, 7], [[5, 0], [2, 3], [1, 4]]),
        # First fit, not best fit: 1 goes beside 7, though it would fill the pack of 5 and 4.
        ([7, 5, 4, 1], [[0, 3], [1, 2]]),
        # Not the fewest, as is known of the method: 5 + 3 + 2 and 4 + 3 + 3 would do.
        ([5, 4, 3, 3, 3, 2], [[0, 1], [2, 3, 4], [5]]),
    ],
)
def test_known_packings_of_ten_tokens(lengths: list[int], packs: list[list[int]]) -> None:
    assert pack_samples(lengths, 10) == packs


def first_fit(lengths: list[int], seq_len: int) -> list[list[int]]:
    """First fit as its definition says, longest first."""
    packs: list[list[int]] = []
    for index, length in sorted(enumerate(lengths), key=lambda item: (-item[1], item[0])):
        for pack in packs:
            if sum(lengths[i] for i in pack) + length <= seq_len:
                pack.append(index)
                break
        else:
            packs.append([index])
    return packs


@st.composite
def samples(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths and a seq_len that holds them."""
    seq_len = draw(st.integers(1, 60))
    return draw(st.lists(st.integers(1, seq_len), max_size=60)), seq_len


@given(samples())
def test_every_sample_is_in_one_pack_and_no_pack_is_too_long(drawn: tuple[list[int], int]) -> None:
    lengths, seq_len = drawn
    packs = pack_samples(lengths, seq_len)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= seq_len for pack in packs)
    assert packs == first_fit(lengths, seq_len)


@st.composite
def full_packs(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Lengths cut from full packs, so that the fewest packs are known: (lengths, seq_len, fewest)."""
    seq_len, fewest = draw(st.integers(1, 50)), draw(st.integers(1, 12))
    lengths: list[int] = []
    for _ in range(fewest):
        cuts = draw(st.sets(st.integers(1, seq_len - 1))) if seq_len > 1 else set()
        edges = [0, *sorted(cuts), seq_len]
        lengths += [end - begin for begin, end in pairwise(edges)]
    return draw(st.permutations(lengths)), seq_len, fewest


@given(full_packs())
def test_at_most_eleven_ninths_of_the_fewest_packs(drawn: tuple[list[int], int, int]) -> None:
    lengths, seq_len, fewest = drawn
    assert fewest <= len(pack_samples(lengths, seq_len)) <= 11 / 9 * fewest + 6 / 9


def test_a_hundred_thousand_samples_take_seconds() -> None:
    generator = random.Random(0)
    lengths = [min(1 + int(generator.expovariate(1 / 300)), 2048) for _ in range(100_000)]
    start = process_time()  # not the wall's, which other processes take part of
    packs = pack_samples(lengths, 2048)
    assert process_time() - start < 5
    assert len(packs) == ceil(sum(lengths) / 2048)  # none could do with fewer
    assert packs == pack_samples(lengths, 2048)


@pytest.mark.parametrize("length", [0, 9])
def test_a_sample_that_fits_no_pack_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"sample 1 has {length} tokens, but a pack takes samples of 1 to seq_len=8"):
        pack_samples([8, length], 8)


class Leaking(QLoRACausalLM):
    """Takes each row for one document."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        rows = [[sum(lengths)] for lengths in batch["document_lengths"]]
        return super().training_step({**batch, "document_lengths": rows}, batch_idx)


class Losses(L.Callback):
    """Keeps what each step and validation logged."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["train_loss"]))

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["val_loss"]))


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_a_step_on_all_samples_is_the_same_packed_or_not(
    one_thread: None, tiny_llama_dir: Path, write_chats: Callable[..., Path]
) -> None:
    chats = write_chats(24)

    def train(module_class: type[QLoRACausalLM], packing: bool) -> tuple[list[float], ChatDataModule]:
        tokenizer, losses = AutoTokenizer.from_pretrained(tiny_llama_dir), Losses()
        data = ChatDataModule(tokenizer, chats, batch_size=32, seq_len=160, packing=packing)
        module = module_class(tiny_llama_dir, default_lora(4), learning_rate=1e-2, packing=packing)
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_steps=3, num_sanity_val_steps=0, callbacks=[losses], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, data)
        return losses.seen, data

    padded, data = train(QLoRACausalLM, packing=False)
    packed, packed_data = train(QLoRACausalLM, packing=True)
    leaking, _ = train(Leaking, packing=True)
    assert len(packed_data.train_set or []) < 0.5 * len(data.train_set or [])
    assert padded[-1] < padded[0] - 0.5
    assert packed == pytest.approx(padded, rel=1e-6)
    assert leaking != pytest.approx(padded, rel=1e-4)
