"""The directory of one training run: what is in it, and whether a new run may use it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import tempfile
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities import rank_zero_only

from .options import RunOptions

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


class Claim:
    """A directory that is this process's alone while this object lives: see :func:`claim_directory`."""

    def __init__(self, root: Path, lock: IO[str], made: bool) -> None:
        self._release = weakref.finalize(self, _release, root, lock, made, os.getpid())

    def release(self) -> None:
        """Let others have the directory, before this object is gone."""
        self._release()


#: Claims of this process: the operating system would give it the same lock again.
_CLAIMS: weakref.WeakValueDictionary[Path, Claim] = weakref.WeakValueDictionary()

_LOCK = ".lock"


def claim_directory(path: Path) -> Claim:
    """Make ``path`` this process's own, so that no other run writes into it, until what is returned is gone.

    The lock is the operating system's, on a file ``.lock`` that names the process: it ends with the process, however
    that ends, so a file that was left behind is in nobody's way. The directory is made if absent, and removed with the
    claim if nothing was written into it.

    Raises:
        ValueError: If another process has claimed it, or as :func:`writable_directory`.
    """
    writable_directory(path)
    root = path.resolve()
    if claim := _CLAIMS.get(root):
        return claim
    made = not root.exists()
    while True:
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = (root / _LOCK).open("a+")
        except FileNotFoundError:
            continue  # a run that ended has removed the directory in between
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            lock.seek(0)
            owner = lock.read().strip() or "one that has just begun"
            lock.close()
            raise ValueError(
                f"output_dir {path} is in use by another run ({owner}). Name another directory, or wait until that run "
                "has ended."
            ) from error
        except OSError as error:
            warnings.warn(
                f"output_dir {path} is on a file system without locks ({error}): make sure that no other run uses it.",
                stacklevel=2,
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), (root / _LOCK).stat()):
                break
        lock.close()  # or the file
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
    lock.flush()
    claim = _CLAIMS[root] = Claim(root, lock, made)
    return claim


def _release(root: Path, lock: IO[str], made: bool, owner: int) -> None:
    if os.getpid() != owner:  # a forked process has a copy of the claim, but not the lock
        return
    with contextlib.suppress(OSError):
        (root / _LOCK).unlink()  # while the lock is held: nobody else has it
    lock.close()
    if made:
        with contextlib.suppress(OSError):
            root.rmdir()  # only if it is empty


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run: ``report.json``, ``adapter/``, ``adapters/`` (peft format) and ``checkpoints/`` (resumable).

    Once :meth:`start` has returned, the directory is this process's own while the object lives.

    Args:
        root: The directory; need not exist.
    """

    root: Path
    _claims: list[Claim] = field(default_factory=list, init=False, repr=False, compare=False)

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

    @property
    def reference(self) -> Path:
        """Log-probabilities of a reference model, where preferences are trained with them computed beforehand."""
        return self.root / "reference.safetensors"

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
            ValueError: If the directory cannot be written, another run is using it, a new run would overwrite an old
                one, or there is no run to resume, or one that was finished and has no checkpoint.
        """
        claim = claim_directory(self.root)
        try:
            checkpoint = self._decide(resume, flags)
        except ValueError:
            if claim not in self._claims:
                claim.release()
            raise
        self._claims.append(claim)
        return checkpoint

    def begin(self, run: RunOptions, flags: Mapping[str, Any] | None = None) -> Path | None:
        """:meth:`start` on the first rank: from then on no other run may use the directory. A dry run claims nothing.

        Returns:
            On every rank, the checkpoint to resume from; ``None`` to begin at step 0.

        Raises:
            ValueError: As :meth:`start`.
        """
        checkpoint: Path | None = None if run.dry_run else rank_zero_only(self.start)(run.resume, flags)
        return checkpoint or (self.latest_checkpoint() if run.resume else None)

    def release(self) -> None:
        """Let other processes use the directory, before this object is gone."""
        while self._claims:
            self._claims.pop().release()

    def _decide(self, resume: bool, flags: Mapping[str, Any] | None) -> Path | None:
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
        warnings.warn(f"Changed since the run in {self.root} was last started: {text}.", stacklevel=4)
