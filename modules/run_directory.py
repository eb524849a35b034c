"""The directory of one training run: what is in it, and whether a new run may use it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

_STEP = re.compile(r"step=(\d+)(?:-v\d+)?\.ckpt$")


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run: ``report.json``, ``adapter/``, ``adapters/`` (peft format) and ``checkpoints/`` (resumable).

    Args:
        root: The directory; need not exist.
    """

    root: Path

    @property
    def report(self) -> Path:
        """The run's report."""
        return self.root / "report.json"

    @property
    def adapter(self) -> Path:
        """The finished adapter."""
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Training checkpoints, named ``...step=N.ckpt``: files, or directories of shards."""
        return self.root / "checkpoints"

    @property
    def adapters(self) -> Path:
        """The adapter of each checkpoint, in ``step=N/``."""
        return self.root / "adapters"

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint of the highest step, the newest among equals."""
        found = [
            (int(match[1]), path) for path in self.checkpoints.glob("*.ckpt") if (match := _STEP.search(path.name))
        ]
        return max(found, key=lambda item: (item[0], item[1].stat().st_mtime))[1] if found else None

    def holds_run(self) -> bool:
        """Whether something of a run is in here. The report of one that failed before its first step is nothing."""
        report = self.report.exists() and not self._failed_at_once()
        return report or self.adapter.exists() or any(self.checkpoints.glob("*"))

    def _failed_at_once(self) -> bool:
        try:
            report = json.loads(self.report.read_text())
            return (report["status"], report["global_step"]) == ("failed", 0)
        except (OSError, ValueError, LookupError, TypeError):
            return False

    def start(self, resume: bool) -> Path | None:
        """Decide where a run begins; returns the checkpoint to resume from, ``None`` to begin at step 0.

        Raises:
            ValueError: If a new run would overwrite an old one, or there is no run to resume.
        """
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"output_dir {self.root} is a file. Name a directory.")
        if not resume:
            if self.holds_run():
                raise ValueError(
                    f"output_dir {self.root} already holds a run. Continue it with --resume, or name another directory."
                )
            return None
        if not (self.holds_run() or self.report.exists()):
            raise ValueError(f"There is no run to resume in output_dir {self.root}.")
        return self.latest_checkpoint()
