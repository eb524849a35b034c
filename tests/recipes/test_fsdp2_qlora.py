"""The main recipe by its command line: the same losses on one device, on two, in stock libraries, and after any death."""

import contextlib
import ctypes
import importlib.util
import json
import math
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lightning_qlora.callbacks.report import Report, load_report
from lightning_qlora.modules import capabilities
from lightning_qlora.modules.cli import run_recipe
from lightning_qlora.modules.data import ChatDataModule
from lightning_qlora.modules.hub import DEMO_MODEL, resolve_model
from lightning_qlora.modules.llama import LLAMA_PROJECTIONS
from lightning_qlora.modules.stdlib_docs import stdlib_api_cards

RECIPE = Path(__file__).parents[2] / "recipes" / "fsdp2_qlora.py"
STEPS = 20
GLOBAL_BATCH, ACCUMULATE = 4, 2

Flags = dict[str, object]


# ---------------------------------------------------------------------------------------------------------- running it


def arguments(flags: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


class Run:
    """The recipe as a user starts it, in a session of its own. Leaving the context kills what is left of it."""

    def __init__(self, flags: Mapping[str, object]) -> None:
        ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
        environment = {key: value for key, value in os.environ.items() if key not in ours}
        # On the CPU: gloo sums in a fixed order, so that equal runs have equal losses to the last bit.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(RECIPE), *arguments(flags)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.text = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)  # every process that could write has ended

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_for_step(self, step: int, timeout: float = 120) -> None:
        self._read_until(lambda line: line is not None and line.startswith(f"step {step}/"), timeout)

    def wait(self, timeout: float = 240) -> int:
        """Wait until all processes have ended; returns the exit code of the first."""
        self._read_until(lambda line: line is None, timeout)
        return self.process.wait(10)

    def second_process(self) -> int:
        """The process id of rank 1."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (child,) = [int(pid) for pid in children if RECIPE.name in Path(f"/proc/{pid}/cmdline").read_text()]
        return child

    def _read_until(self, is_it: Callable[[str | None], bool], timeout: float) -> None:
        deadline = monotonic() + timeout
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - monotonic()))
            except queue.Empty:
                raise AssertionError(f"nothing more came within {timeout} s after:\n{self.text}") from None
            self.text += line or ""
            if is_it(line):
                return
            assert line is not None, f"it ended before that:\n{self.text}"


def train(flags: Mapping[str, object]) -> Report:
    """Run to the end and return the report."""
    with Run(flags) as run:
        assert run.wait() == 0, run.text
    report = load_report(Path(str(flags["output_dir"])) / "report.json")
    assert report["status"] == "completed"
    assert len(report["losses"]) == flags["max_steps"]
    return report


def difference(losses: list[Any], expected: list[Any]) -> float:
    """The largest relative difference over the steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


# ------------------------------------------------------------------------------------------------------- model and data


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def flags(tiny_llama_dir: Path, chats: Path) -> Flags:
    """Of all runs of the tiny model, but for the devices and the output."""
    return {
        "model": tiny_llama_dir, "dataset": chats, "max_steps": STEPS, "accumulate": ACCUMULATE, "seq_len": 256,
        "precision": "32-true", "lr": 5e-3, "lora_r": 4, "lora_alpha": 8, "seed": 7, "save_every": 1,
    }  # fmt: skip


def on(devices: int, output_dir: Path) -> Flags:
    return {"devices": devices, "batch_size": GLOBAL_BATCH // devices, "output_dir": output_dir}


@pytest.fixture(scope="module")
def whole(flags: Flags, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run on two devices that nothing interrupted. Read only."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    train(flags | on(2, output_dir))
    return output_dir


# --------------------------------------------------------------------------------------------------------------- parity


def write_stock_adapter(model_dir: Path, directory: Path, r: int) -> Path:
    """An adapter as peft itself makes it, with B not zero, so that A has a gradient from the first step."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    torch.manual_seed(1)
    lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(LLAMA_PROJECTIONS), task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(directory)
    return directory


def stock_losses(model_dir: Path, adapter: Path, flags: Mapping[str, Any]) -> list[float]:
    """The training that the recipe promises, on stock transformers, peft and bitsandbytes' Linear4bit.

    One sample at a time, without padding: each step's loss is the mean over all completion tokens of its samples.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, quantization_config=quantization, device_map="cpu"
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it repacks weights in eval mode, and gradients are lost
    model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}

    data = ChatDataModule(
        AutoTokenizer.from_pretrained(model_dir),
        flags["dataset"],
        batch_size=GLOBAL_BATCH,
        seq_len=flags["seq_len"],
        val_samples=32,
    )
    data.load()
    assert data.train_set is not None
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < flags["max_steps"]:
        order = np.random.default_rng([flags["seed"], epoch]).permutation(len(data.train_set)).tolist()
        a_step = GLOBAL_BATCH * flags["accumulate"]
        steps += [order[first : first + a_step] for first in range(0, len(order), a_step)]
        epoch += 1

    optimizer = torch.optim.AdamW(parameters, lr=flags["lr"], weight_decay=0.0)
    warmup, losses = flags["max_steps"] // 20, []
    for step, samples in enumerate(steps[: flags["max_steps"]]):
        decayed = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (flags["max_steps"] - warmup)))
        factor = (step + 1) / (warmup + 1) if step < warmup else decayed
        rows = [data.train_set[i] for i in samples]
        count = sum(label != -100 for row in rows for label in row["labels"][1:])
        total = 0.0
        optimizer.zero_grad()
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            labels = torch.tensor(row["labels"][1:])
            loss = torch.nn.functional.cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = flags["lr"] * factor
        optimizer.step()
        losses.append(total)
    return losses


def test_two_devices_train_as_one_and_as_stock_libraries(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_stock_adapter(Path(str(flags["model"])), tmp_path / "adapter", r=4)
    flags = flags | {"init_adapter": adapter}
    two = train(flags | on(2, tmp_path / "two"))
    one = train(flags | on(1, tmp_path / "one"))
    stock = stock_losses(Path(str(flags["model"])), adapter, flags)
    to_one, to_stock = difference(two["losses"], one["losses"]), difference(two["losses"], stock)
    with capsys.disabled():
        print(
            f"\n2 devices: to 1 device {to_one:.1e}, to stock libraries {to_stock:.1e} ({stock[0]:.3f} -> {stock[-1]:.3f})"
        )
    assert (two["world_size"], one["world_size"]) == (2, 1)
    assert min(stock) < 0.8 * stock[0]  # it learns: a run that does nothing would agree with itself as well
    assert to_one <= 1e-5
    assert to_stock <= 1e-3
    assert two["val_losses"] == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in one["val_losses"]]
    assert len(two["val_losses"]) > 0


@pytest.mark.slow
def test_the_demo_model_trains_as_in_stock_libraries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = resolve_model(DEMO_MODEL)
    cards = stdlib_api_cards()[:20]
    dataset = tmp_path / "cards.jsonl"
    dataset.write_text("".join(json.dumps(card) + "\n" for card in cards))
    adapter = write_stock_adapter(directory, tmp_path / "adapter", r=8)
    flags: Flags = {
        "model": DEMO_MODEL, "dataset": dataset, "max_steps": 6, "accumulate": 1, "seq_len": 96, "precision": "32-true",
        "lr": 1e-3, "lora_r": 8, "lora_alpha": 16, "seed": 3, "init_adapter": adapter, "prompt": "Hi",
    }  # fmt: skip
    two = train(flags | on(2, tmp_path / "two"))
    stock = stock_losses(directory, adapter, flags)
    to_stock = difference(two["losses"], stock)
    with capsys.disabled():
        print(f"\ndemo model, 2 devices: to stock libraries {to_stock:.1e} ({stock[0]:.3f} -> {stock[-1]:.3f})")
    assert stock[-1] < stock[0]
    assert to_stock <= 1e-3
