"""Every tensor of a file has a place in the model, and every place a tensor: what is left on either side is an error.

Whatever reads weights ends with :func:`check_accounted`: base checkpoints, GGUF conversion, adapters. A tensor that
nobody takes means that the model computes something else than the one whose file it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple


class Unused(NamedTuple):
    """Tensors that files may hold although no model takes them.

    Attributes:
        pattern: Regular expression that all of a tensor's name matches.
        reason: Why nothing is lost without it.
    """

    pattern: str
    reason: str


def check_accounted(
    source: str | Path,
    *,
    wanted: Iterable[str],
    held: Iterable[str],
    known: Sequence[Unused] = (),
    remedy: str,
) -> None:
    """Check that ``source`` holds what the model needs, and nothing that the model does not take.

    Args:
        source: What was read, for the message.
        wanted: Names of all tensors that the model takes.
        held: Names of all tensors that are there.
        known: What may be there for nothing.
        remedy: The message's last sentence: what to do.

    Raises:
        ValueError: Naming the first tensors that are missing, and the first that nobody takes.
    """
    wanted, held = set(wanted), set(held)
    missing, unused = sorted(wanted - held), left_over(wanted, held, known)
    if not (missing or unused):
        return
    faults = []
    if missing:
        faults.append(f"lacks {_some(missing)}, which the model needs")
    if unused:
        faults.append(f"holds {_some(unused)}, which the model does not take")
    raise ValueError(f"{source} {' and '.join(faults)}. {remedy}")


def left_over(wanted: Iterable[str], held: Iterable[str], known: Sequence[Unused] = ()) -> list[str]:
    """Names in ``held`` that nobody takes, sorted; arguments as of :func:`check_accounted`."""
    return sorted(
        name for name in set(held) - set(wanted) if not any(re.fullmatch(each.pattern, name) for each in known)
    )


def _some(names: list[str]) -> str:
    """The first names, and how many there are if not all are shown."""
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{len(names)} tensors ({shown}, ...)"
