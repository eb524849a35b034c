"""Record what ``recipes/packing_flex.py`` measures of training: the same samples padded and packed.

    python recipes/benchmarks/packing.py --lengths '[2048, 8192]' --max_steps 6     # the recipe's flags

Writes ``results/packing.json``. Attention by itself is what ``packed_attention.py`` records.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from record import RESULTS, ROOT, save_record


def main() -> int:
    """Run the recipe, print and record; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=None)
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(ROOT / "recipes" / "packing_flex.py"), "--output_dir", directory, *flags]
        status = subprocess.run(command, check=False).returncode
        if status:  # losses differ, or a run failed: nothing to record
            return status
        report = json.loads((Path(directory) / "report.json").read_text())
    counts = report["tokens_of_samples"]
    of_samples = f"Samples of {min(counts)} to {max(counts)} tokens; tokens/s are theirs, without padding."
    save_record(
        "packing",
        list(report["runs"][0]),
        [list(row.values()) for row in report["runs"]],
        notes=f"{of_samples} {report['precision']}, one device, activation checkpointing; equal samples in each step. "
        "A padded run is named by the samples of a micro-batch, a packed one by its attention and the tokens of a row.",
        directory=arguments.results,
        commit=arguments.commit,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
