"""Autograd inside an operator: for a backward that is the derivative of the forward, computed again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def with_autograd(work: Callable[[], T], device: torch.device) -> T:
    """``work()`` where autograd records, on the current CUDA stream of ``device``.

    AOTAutograd runs a new graph for the first time under a dispatch mode, inside which autograd is off for the whole
    thread. Another thread has its own state.
    """
    with torch.enable_grad():
        if (torch.zeros(1, requires_grad=True) * 1).requires_grad:
            return work()
    return _in_new_thread(work, device)


def _in_new_thread(work: Callable[[], T], device: torch.device) -> T:
    outcome: list[Any] = []
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run_here() -> None:
        try:
            with torch.cuda.stream(stream):
                outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run_here)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]  # type: ignore[no-any-return]
