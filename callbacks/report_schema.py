"""`report.json`: its fields, what their values must be, and how it is read."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypedDict, cast, get_args

from .measure import MemoryKind

SCHEMA_VERSION = 1

Status = Literal["running", "completed", "interrupted", "failed"]


class Report(TypedDict):
    """The fields of `report.json`, schema version 1.

    JSON has no NaN or infinity: a figure that is not finite, or that is not known, is stored as ``null``.

    ================== ================== ============================================================================
    field              unit               meaning
    ================== ================== ============================================================================
    schema_version     --                 raised when a field changes its meaning or goes
    status             --                 ``running`` (and so it stays if the process was killed); ``completed``;
                                          ``interrupted``, by SIGINT or SIGTERM; ``failed``, by an exception
    error              --                 type and text of the exception that ended the run, else null
    start_time         UTC, ISO 8601      start of training; of the first run if this one is resumed
    end_time           UTC, ISO 8601      end of training; null while running
    global_step        optimizer steps    done so far, over all resumed runs
    resumed_from_step  optimizer steps    where this process began; 0 if it was not resumed
    losses             as logged          ``losses[i]`` is what rank 0 logged for optimizer step i + 1 of the whole
                                          run, resumed or not
    val_losses         as logged          pairs [optimizer steps done, loss] of the whole run, but for a validation
                                          that was due at the step of a checkpoint from which a killed run was resumed
    tokens_per_s       tokens / s         all ranks, over the timed steps of this process; null without one
    step_time_s        s / optimizer step ``p50`` and ``p95`` over the timed steps of this process, on rank 0; null
                                          without one
    warmup_steps       optimizer steps    how many first steps of this process are not timed
    peak_memory_gib    GiB (2**30 bytes)  one per rank, since the process started
    memory_kind        --                 ``cuda_max_allocated``: PyTorch's allocator on the rank's GPU;
                                          ``process_peak_rss``: resident set of the rank's process
    world_size         processes          how many ranks
    devices            --                 name of the device, one per rank
    strategy           --                 class name of the Lightning strategy
    precision          --                 as in ``Trainer(precision=...)``
    model              --                 ``metadata["model"]``, else null
    metadata           --                 what else the recipe passed as ``metadata`` to the process that wrote this
    versions           --                 of the packages that matter here, if installed, and of Python
    sections           --                 what other callbacks contributed, by their key, in a form that they document
                                          (``memory``: :class:`~lightning_qlora.callbacks.MemorySection`): see
                                          :class:`ReportSource`
    ================== ================== ============================================================================

    A timed step's time reaches from the end of the step before to its own end on the host: waiting for data and writing
    checkpoints included, validation not (see :class:`~lightning_qlora.callbacks.measure.StepMeter`).
    """

    schema_version: int
    status: Status
    error: str | None
    start_time: str
    end_time: str | None
    global_step: int
    resumed_from_step: int
    losses: list[float | None]
    val_losses: list[tuple[int, float | None]]
    tokens_per_s: float | None
    step_time_s: dict[str, float] | None
    warmup_steps: int
    peak_memory_gib: list[float]
    memory_kind: MemoryKind
    world_size: int
    devices: list[str]
    strategy: str
    precision: str
    model: str | None
    metadata: dict[str, Any]
    versions: dict[str, str]
    sections: dict[str, dict[str, Any]]


def load_report(path: str | os.PathLike[str]) -> Report:
    """Read a report and check its schema version, its fields and their types.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a report of this schema version; names the first wrong field.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): it was not written by RunReport, or was edited") from error
    if not isinstance(value, dict) or "schema_version" not in value:
        raise ValueError(f"{path} has no 'schema_version': it was not written by RunReport")
    if value["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {value['schema_version']!r}, this version of lightning-qlora reads"
            f" {SCHEMA_VERSION}: read it with the version that wrote it (its field 'versions' says which)"
        )
    for field, (is_valid, expected) in _FIELDS.items():
        if field not in value:
            raise ValueError(f"{path} lacks the field {field!r}: it was edited, or is not a report")
        if not is_valid(value[field]):
            raise ValueError(f"{path}: {field} must be {expected}, but is {value[field]!r:.80}")
    value["val_losses"] = [(step, loss) for step, loss in value["val_losses"]]
    return cast(Report, value)


def _a(*types: type) -> Callable[[Any], bool]:
    """Whether a value from JSON is of one of ``types``; its true and false are no numbers."""
    return lambda value: isinstance(value, types) and not isinstance(value, bool)


_is_number, _is_number_or_null = _a(int, float), _a(int, float, NoneType)


def _is_int(value: Any) -> bool:
    return _a(int)(value) and value >= 0


def _list_of(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_valid, value))


def _is_val_loss(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_int(value[0]) and _is_number_or_null(value[1])


def _is_step_time(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and value.keys() == {"p50", "p95"} and all(map(_is_number, value.values()))
    )


def _one_of(literal: Any) -> tuple[Callable[[Any], bool], str]:
    allowed = get_args(literal)
    return lambda value: value in allowed, f"one of {', '.join(allowed)}"


_INT = (_is_int, "an integer of at least 0")
_TEXT = (_a(str), "a string")
_TEXT_OR_NULL = (_a(str, NoneType), "a string or null")
_DICT = (_a(dict), "an object")

# Field of `Report` -> (is the value valid?, what it must be).
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "schema_version": _INT,
    "status": _one_of(Status),
    "error": _TEXT_OR_NULL,
    "start_time": _TEXT,
    "end_time": _TEXT_OR_NULL,
    "global_step": _INT,
    "resumed_from_step": _INT,
    "losses": (_list_of(_is_number_or_null), "a list of numbers and nulls"),
    "val_losses": (_list_of(_is_val_loss), "a list of [step, number or null]"),
    "tokens_per_s": (_is_number_or_null, "a number or null"),
    "step_time_s": (_is_step_time, "an object with p50 and p95, or null"),
    "warmup_steps": _INT,
    "peak_memory_gib": (_list_of(_is_number), "a list of numbers"),
    "memory_kind": _one_of(MemoryKind),
    "world_size": _INT,
    "devices": (_list_of(_a(str)), "a list of strings"),
    "strategy": _TEXT,
    "precision": _TEXT,
    "model": _TEXT_OR_NULL,
    "metadata": _DICT,
    "versions": _DICT,
    "sections": _DICT,
}
