"""Run the main recipe in every precision on one and on two devices, and record losses and memory.

    python recipes/benchmarks/fsdp2_qlora.py
    python recipes/benchmarks/fsdp2_qlora.py --at_once 6 --seq_len 512    # other flags are the recipe's

Needs two GPUs, or runs on CPU processes. Every run sees the same global batches, so the losses can be compared step by
step: against the same precision on one device, and against float32. Results go to ``results/fsdp2_qlora.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, ROOT, save_record

COLUMNS = [
    "devices",
    "precision",
    "first loss",
    "last loss",
    "largest difference from 1 device",
    "largest difference from fp32, 1 device",
    "peak memory per rank, GiB",
]


def run(devices: int, precision: str, steps: int, batch: int, directory: Path, extra: list[str]) -> dict[str, Any]:
    """One run of the recipe with ``batch`` samples a step over all devices; returns its report."""
    output = directory / f"{devices}-{precision}"
    command = [sys.executable, str(ROOT / "recipes" / "fsdp2_qlora.py"), "--output_dir", str(output)]
    command += ["--devices", str(devices), "--precision", precision, "--max_steps", str(steps)]
    command += ["--batch_size", str(batch // devices), "--save_every", str(steps), *extra]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help="samples of one step over all devices")
    parser.add_argument("--at_once", type=int, default=1, help="runs at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=None)
    arguments, extra = parser.parse_known_args()
    gpus = torch.cuda.device_count()
    precisions = ["32-true", "16-mixed", "bf16-mixed"] if gpus else ["32-true"]
    runs = [(devices, precision) for precision in precisions for devices in (1, 2) if not gpus or devices <= gpus]
    reports: dict[tuple[int, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(arguments.at_once) as pool:
        futures = [pool.submit(run, *each, arguments.steps, arguments.batch, Path(directory), extra) for each in runs]
        for each, future in zip(runs, futures, strict=True):
            reports[each] = future.result()
            path = record(reports, arguments)  # of those so far: the rest may be stopped
            print(*each, f"last loss {reports[each]['losses'][-1]:.4f}", flush=True)
    print(path.read_text())


def record(reports: dict[tuple[int, str], dict[str, Any]], arguments: argparse.Namespace) -> Path:
    """Record the reports of (devices, precision), of which those of one device come first in each precision."""

    def difference(losses: list[float], precision: str) -> float:
        return max(abs(a - b) for a, b in zip(losses, reports[1, precision]["losses"], strict=True))

    rows = [
        [
            devices,
            precision,
            report["losses"][0],
            report["losses"][-1],
            difference(report["losses"], precision),
            difference(report["losses"], "32-true"),
            ", ".join(f"{gib:.2f}" for gib in report["peak_memory_gib"]),
        ]
        for (devices, precision), report in reports.items()
    ]
    return save_record(
        "fsdp2_qlora",
        COLUMNS,
        rows,
        notes=f"SmolLM2-135M-Instruct, r 64, {arguments.batch} samples a step, {arguments.steps} steps.",
        directory=arguments.results,
        commit=arguments.commit,
        losses={f"{devices}x {precision}": report["losses"] for (devices, precision), report in reports.items()},
    )


if __name__ == "__main__":
    main()
