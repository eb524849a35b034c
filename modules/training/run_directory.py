"""The directory of one training run: what is in it, and whether a new run may use it."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STEP = re.compile(r"step=(\d+)(?:-v\d+)?\.ckpt$")

_OF_THE_CALL = ("output_dir", "resume", "dry_run")  # flags that say nothing about the training


def writable_directory(path: Path) -> None:
    """Check, before hours of work, that a directory can be made at ``path``, or written to. Leaves nothing behind.

    Raises:
        ValueError: If it is a file, or the operating system refuses to make a file there.
    """
    try:
        if path.exists() and not path.is_dir():
            raise ValueError(f"output_dir {path} is a file. Name a directory.")
        # Not by making it: a run that is refused for another reason would leave an empty directory.
        nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir {path} cannot be written ({type(error).__name__}: {error}). Name another directory."
        ) from error


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

    @staticmethod
    def adapter_meant_by(path: Path) -> Path | None:
        """The adapter of a run, if ``path`` is the run's directory or one of its checkpoints and it has one."""
        run = RunDirectory(path.parent.parent if path.suffix == ".ckpt" else path)
        candidates = (run.adapters / path.stem.removeprefix("interrupted-"), run.adapter)
        return next((each for each in candidates if (each / "adapter_config.json").is_file()), None)

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint of the highest step, the newest among equals."""
        found = [
            (int(match[1]), path) for path in self.checkpoints.glob("*.ckpt") if (match := _STEP.search(path.name))
        ]
        return max(found, key=lambda item: (item[0], item[1].stat().st_mtime))[1] if found else None

    def holds_run(self) -> bool:
        """Whether something of a run is in here. The report of one that ended before its first step is nothing."""
        report = self.report.exists() and self._read_report().get("global_step") != 0
        return report or self.adapter.exists() or any([*self.checkpoints.glob("*"), *self.adapters.glob("*")])

    def start(self, resume: bool, flags: Mapping[str, Any] | None = None) -> Path | None:
        """Decide where a run begins; returns the checkpoint to resume from, ``None`` to begin at step 0.

        Args:
            resume: Whether to go on with the run that is in here.
            flags: What the run is started with, of JSON types. A resumed run warns of those that differ from the
                report's ``metadata``.

        Raises:
            ValueError: If the directory cannot be written, a new run would overwrite an old one, or there is no run to
                resume, or one that was finished and has no checkpoint.
        """
        writable_directory(self.root)
        if not resume:
            if self.holds_run():
                raise ValueError(
                    f"output_dir {self.root} already holds a run. Continue it with --resume, or name another directory."
                )
            return None
        if not (self.holds_run() or self.report.exists()):
            raise ValueError(f"There is no run to resume in output_dir {self.root}.")
        report = self._read_report()
        if checkpoint := self.latest_checkpoint():
            self._warn_of_changes(report, flags or {})
            return checkpoint
        if self.adapter.exists():
            raise ValueError(
                f"output_dir {self.root} holds no checkpoint to go on from. To train its adapter further, use"
                f" --init_adapter {self.adapter} and another --output_dir."
            )
        if report.get("status") == "completed" and report.get("global_step"):
            raise ValueError(
                f"output_dir {self.root} holds no checkpoint to go on from, but the report of a completed run. Name"
                " another directory."
            )
        print(f"{self.root} holds no checkpoint yet: beginning at step 0.", flush=True)
        return None

    def _read_report(self) -> dict[str, Any]:
        """The report, or nothing if it is not there or damaged."""
        try:
            report = json.loads(self.report.read_text())
        except (OSError, ValueError):
            return {}
        return report if isinstance(report, dict) else {}

    def _warn_of_changes(self, report: dict[str, Any], flags: Mapping[str, Any]) -> None:
        before = {"model": report.get("model"), **(report.get("metadata") or {})}
        changed = [name for name in flags if name in before and before[name] != flags[name]]
        changed = [name for name in changed if name not in _OF_THE_CALL]
        if not changed:
            return
        text = ", ".join(f"{name} {before[name]} -> {flags[name]}" for name in changed)
        if "lr" in changed:
            text += ". lr has no effect: the checkpoint's schedule goes on"
        warnings.warn(f"Changed since the run in {self.root} was last started: {text}.", stacklevel=3)
