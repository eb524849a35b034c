"""Data and flags of short runs of the main recipe, and one that nothing interrupted."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import RankPools
from tests.recipes.runs import ACCUMULATE, STEPS, Flags, Run, completed, on


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 chats, 2 of them held out; completions have between 1 and 60 words.

    25 samples make 7 global batches, the last of one sample: rank 1 gets none of it, and the fourth step of each epoch
    has one micro-batch instead of two.
    """
    words, draw = ["red", "green", "blue", "sky", "sea"], random.Random(0)
    rows = [
        {
            "instruction": f"say {i} " + "x" * draw.randint(1, 30),
            "response": " ".join(draw.choices(words, k=draw.choice([1, 2, 5, 60]))),
        }
        for i in range(27)
    ]
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def flags(tiny_llama_dir: Path, chats: Path) -> Flags:
    """Of all runs of the tiny model, but for the devices and the output."""
    return {
        "model": tiny_llama_dir, "dataset": chats, "max_steps": STEPS, "accumulate": ACCUMULATE, "seq_len": 256,
        "precision": "32-true", "lr": 5e-3, "lora_r": 4, "lora_alpha": 8, "seed": 7, "save_every": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def ranks(all_ranks: RankPools) -> Iterator[RankPools]:
    """New worker processes, because a recipe takes more of a process than a test does; none stays."""
    all_ranks.shrink("cpu", 0)
    yield all_ranks
    all_ranks.shrink("cpu", 0)


@pytest.fixture(scope="session")
def whole(flags: Flags, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run on two devices that nothing interrupted. Read only."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    with Run(flags | on(2, output_dir)) as run:
        assert run.wait() == 0, run.text
    assert f"python recipes/chat.py --adapter {output_dir}/adapter" in run.text
    assert f"python recipes/export_gguf.py --adapter {output_dir}/adapter" in run.text
    completed(flags | on(2, output_dir))
    return output_dir
