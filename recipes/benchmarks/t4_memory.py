"""What trains within a Tesla T4's memory: the peak that the plan predicts, and the one that is measured.

    python recipes/benchmarks/t4_memory.py --at_once 5

Needs two GPUs of any size: PyTorch may reserve 14.5 GiB of each, which is what a T4 has. Each configuration is a run of
``train_step.py`` on random weights; it is the peak that counts, so several may run at a time. Without a GPU it runs the
tiny shape, whose peak nobody measures. Writes ``results/t4_memory.json``.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, ROOT, save_record

from lightning_qlora.modules.checkpoints.random_weights import SHAPES, checkpoint_of
from lightning_qlora.modules.cli import positive, run_recipe
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.training.memory_plan import GIB, Settings, plan_memory

CAP_GIB = 14.5
COLUMNS = ["shape", "r", "batch x tokens a GPU", "flags", "planned peak, GiB", "measured peak, GiB", "reserved, GiB"]


@dataclass(frozen=True)
class Configuration:
    """Flags of ``train_step.py``: float16, two devices, activation checkpointing."""

    shape: str
    batch_size: int = 1
    seq_len: int = 2048
    lora_r: int = 64
    strategy: str = "fsdp2"
    compile: str = "off"
    offload_activations: bool = False
    offload: bool = False

    def flags(self) -> list[str]:
        """Of ``train_step.py``, all of them: its defaults are others."""
        return [f"--{name}={str(value).lower()}" for name, value in dataclasses.asdict(self).items()]

    def special_flags(self) -> str:
        """Those that are neither a size nor at their default."""
        plain = Configuration(self.shape, self.batch_size, self.seq_len, self.lora_r).flags()
        return " ".join(flag for flag in self.flags() if flag not in plain)

    def planned_gib(self, precision: str, compute_capability: tuple[int, int] | None) -> float:
        """The peak of the first GPU by ``plan_memory``."""
        settings = Settings(
            config=SHAPES[self.shape].config(), lora=default_lora(self.lora_r), batch_size=self.batch_size,
            seq_len=self.seq_len, world_size=2, strategy=self.strategy, precision=precision,  # type: ignore[arg-type]
            offload=self.offload, checkpoint_activations=True, offload_activations=self.offload_activations,
            compile=self.compile != "off", compute_capability=compute_capability,
        )  # fmt: skip
        return plan_memory(settings).total_bytes / GIB


ON_GPUS = [
    Configuration("llama-3.2-1b", batch_size=4, strategy="ddp"),
    Configuration("llama-3.1-8b"),
    Configuration("llama-3.1-8b", batch_size=4),
    Configuration("llama-3.1-8b", batch_size=4, compile="default"),
    Configuration("llama-3.1-8b", offload=True),
    Configuration("llama-3.1-8b", seq_len=8192, offload_activations=True),
    Configuration("qwen2.5-32b", lora_r=16),
    Configuration("qwen2.5-32b", lora_r=16, offload_activations=True),
    Configuration("qwen2.5-32b", offload=True),
]
ON_CPU = [Configuration("tiny", seq_len=32), Configuration("tiny", seq_len=32, strategy="ddp")]


def measure(configuration: Configuration, precision: str, capped: bool) -> dict[str, Any] | None:
    """The figures of one run of ``train_step.py``; ``None`` if it does not fit."""
    with tempfile.TemporaryDirectory() as results:
        command = [sys.executable, str(ROOT / "recipes" / "benchmarks" / "train_step.py"), "--devices=2"]
        command += [f"--precision={precision}", "--steps=2", "--warmup=1", f"--results={results}", "--commit=-"]
        command += configuration.flags()
        command += [f"--memory_cap_gib={CAP_GIB}"] if capped else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            if "OutOfMemoryError" in done.stderr:
                return None
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        (figures,) = json.loads((Path(results) / "train_step.json").read_text())["runs"].values()
        return dict(figures)


def main(at_once: int = 1, results: Path = RESULTS, commit: str | None = None) -> int:
    """Measure every configuration and record them.

    Args:
        at_once: How many to run at a time: the GPUs must hold the caps of all.
        results: Directory of the record.
        commit: Commit of the code measured; read from git unless given.
    """
    positive(at_once=at_once)
    gpus = torch.cuda.device_count()
    if gpus == 1:
        print("Two GPUs are needed and there is one: nothing measured.", file=sys.stderr)
        return 0
    configurations, precision = (ON_GPUS, "16-mixed") if gpus else (ON_CPU, "32-true")
    capability = torch.cuda.get_device_capability() if gpus else None
    for shape in dict.fromkeys(configuration.shape for configuration in configurations):
        checkpoint_of(shape)
    rows = []
    notes = f"Two GPUs, {precision}, activation checkpointing; at most {CAP_GIB} GiB may be reserved on each."
    with ThreadPoolExecutor(at_once) as pool:
        runs = pool.map(lambda configuration: measure(configuration, precision, gpus > 0), configurations)
        for c, figures in zip(configurations, runs, strict=True):
            peaks = [
                max(figures[f"train_{kind}_gib"]) if figures else "does not fit" for kind in ("allocated", "reserved")
            ]
            size = f"{c.batch_size} x {c.seq_len}"
            rows.append([c.shape, c.lora_r, size, c.special_flags(), c.planned_gib(precision, capability), *peaks])
            path = save_record(  # of those so far: the rest may be stopped
                "t4_memory",
                COLUMNS,
                rows,
                notes=notes,
                directory=results,
                commit=commit,
            )
    print(path.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(run_recipe(main))
