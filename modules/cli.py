"""Recipe flags from one typed function signature, through jsonargparse (Lightning's own command-line parser)."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Types and defaults as jsonargparse shows them, under the recipe's docstring as it is written."""


def run_recipe(main: Callable[..., int | None], args: list[str] | None = None) -> int:
    """Parse the command line into ``main``'s parameters and call it.

    Every parameter becomes a flag with its type, default and docstring line; booleans can be given bare (``--resume``)
    or as ``--resume=false``; ``--config file.yaml`` reads flags from a file. A ``ValueError`` from ``main`` is a user's
    mistake: it is printed as one message without a traceback.

    Returns:
        The exit status: ``main``'s, 0 if that is ``None``, or 2 after a ``ValueError``.
    """
    parser = ArgumentParser(
        prog=f"python {os.path.relpath(sys.argv[0])}",
        usage="%(prog)s [flags]",
        description=inspect.getdoc(inspect.getmodule(main)),
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these flags.")
    flags = {name for name, p in inspect.signature(main).parameters.items() if p.annotation in (bool, "bool")}
    parser.add_function_arguments(main, skip=flags, as_group=False)
    helps = _parameter_help(main)
    for name in sorted(flags):
        default = inspect.signature(main).parameters[name].default
        parser.add_argument(f"--{name}", action=ActionYesNo, nargs="?", default=default, help=helps.get(name))
    parsed = parser.parse_args(args).as_dict()
    parsed.pop("config", None)
    # Read when the GPU is first used, here and in the processes to come. The batches of a run differ in length, and in
    # blocks of fixed sizes the gaps between them took 2 to 3 GiB of a T4's 14.5 (8B model, two GPUs).
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        return main(**parsed) or 0
    except ValueError as error:
        if os.environ.get("LIGHTNING_QLORA_TRACEBACK"):
            raise
        print(f"{parser.prog}: error: {error}", file=sys.stderr, flush=True)
        return 2


def run_again(*flags: str, **variables: str) -> int:
    """Run this script once more in a process of its own, with its own flags, ``flags`` and environment ``variables``.

    Returns:
        Its exit status, as a shell tells it: 128 and more where a signal ended it.
    """
    status = subprocess.run([sys.executable, *sys.argv, *flags], env=os.environ | variables, check=False).returncode
    return status if status >= 0 else 128 - status


def as_metadata(flags: Mapping[str, Any]) -> dict[str, Any]:
    """``flags``, which are ``locals()`` at the start of ``main``, as a report stores them: paths as text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}


def positive(**values: int) -> None:
    """Check that every value is at least 1.

    Raises:
        ValueError: Naming the flag that is not.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")


def quiet_libraries() -> None:
    """Silence what other libraries say that a user of these recipes can do nothing about."""
    # At import, bitsandbytes looks for an optional CPU kernel that this package does not use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Lightning recommends products once a Trainer, at info level.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "💡 Tip" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")


def _parameter_help(main: Callable[..., Any]) -> dict[str, str]:
    return {p.arg_name: p.description or "" for p in parse_docstring(inspect.getdoc(main) or "").params}


quiet_libraries()
