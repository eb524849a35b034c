"""Recipe flags from one typed function signature, through jsonargparse (Lightning's own command-line parser).

A parameter of the function is a flag, or a *group* of flags: a frozen dataclass such as
:class:`~lightning_qlora.modules.lora.config.LoraOptions`, whose fields become flags of the same names::

    def main(lora: LoraOptions = LoraOptions(lora_r=16), max_steps: int = 30) -> int: ...

    if __name__ == "__main__":
        sys.exit(run_recipe(main))  # --lora_r, --lora_alpha, ..., --max_steps

A default instance in the signature changes the defaults of its flags. ``Annotated[LoraOptions, Only("lora_r")]`` offers
only some of a group's fields as flags; the others stay as they are in the default instance.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter

from .options import at_least


class Only:
    """Offer only these fields of a group as flags: ``Annotated[StrategyOptions, Only("devices", "precision")]``."""

    def __init__(self, *names: str) -> None:
        self.names = names


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a recipe.

    Attributes:
        name: Without the dashes.
        type: What values may be, as annotated.
        default: Its default; ``dataclasses.MISSING`` if it must be given.
        help: Its line of the docstring.
        parameter: The parameter of the recipe that it is, or whose group it belongs to.
        title: The first line of the group's docstring; ``None`` for a flag of the recipe's own.
    """

    name: str
    type: Any
    default: Any
    help: str | None
    parameter: str
    title: str | None


def flags_of(main: Callable[..., Any]) -> list[Flag]:
    """All flags of a recipe, in the order of its parameters and of the fields of its groups.

    Raises:
        TypeError: If two parameters have a flag of the same name, or ``Only`` names a field that does not exist.
    """
    hints, helps = get_type_hints(main, include_extras=True), _helps(main)
    found: list[Flag] = []
    for name, parameter in inspect.signature(main).parameters.items():
        hint, default = hints[name], parameter.default
        group, only = _group(hint)
        if group is None:
            default = dataclasses.MISSING if default is parameter.empty else default
            found.append(Flag(name, hint, default, helps.get(name), name, None))
        else:
            found += _flags_of_group(name, group, only, None if default is parameter.empty else default)
    names = [flag.name for flag in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TypeError(f"{main.__qualname__} has the flags {sorted(twice)} more than once.")
    return found


def _group(hint: Any) -> tuple[type[Any] | None, Only | None]:
    """The dataclass that ``hint`` names, if it does, and which of its fields are flags; ``None`` is all."""
    only = None
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        only = next((note for note in notes if isinstance(note, Only)), None)
    return (hint, only) if inspect.isclass(hint) and dataclasses.is_dataclass(hint) else (None, None)


def _flags_of_group(parameter: str, group: type[Any], only: Only | None, default: Any) -> list[Flag]:
    hints, helps = get_type_hints(group), _helps(group)
    fields = {field.name: field for field in dataclasses.fields(group)}
    names = tuple(fields) if only is None else only.names
    if unknown := set(names) - fields.keys():
        raise TypeError(f"{group.__qualname__} has no fields {sorted(unknown)}.")
    title = (parse_docstring(group.__doc__ or "").short_description or group.__qualname__).rstrip(".")
    return [
        Flag(
            name,
            hints[name],
            fields[name].default if default is None else getattr(default, name),
            helps.get(name),
            parameter,
            title,
        )
        for name in fields
        if name in names
    ]


def group_flags(main: Callable[..., Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ``main`` from flags by name, e.g. to call a recipe from Python or a notebook.

    Args:
        main: A recipe's function, as for :func:`run_recipe`.
        flags: Values of some of its flags; the others have their defaults.

    Raises:
        TypeError: If ``main`` has no such flag.
        ValueError: As a group's own checks do.
    """
    known = {flag.name: flag for flag in flags_of(main)}
    if unknown := flags.keys() - known.keys():
        raise TypeError(f"{main.__qualname__} has no flags {sorted(unknown)}.")
    arguments = {name: value for name, value in flags.items() if known[name].title is None}
    hints = get_type_hints(main, include_extras=True)
    for name, parameter in inspect.signature(main).parameters.items():
        group, _ = _group(hints[name])
        if group is not None:
            given = {flag: value for flag, value in flags.items() if known[flag].parameter == name}
            has_default = parameter.default is not parameter.empty
            arguments[name] = dataclasses.replace(parameter.default, **given) if has_default else group(**given)
    return arguments


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Types and defaults as jsonargparse shows them, under the recipe's docstring as it is written."""


def run_recipe(main: Callable[..., int | None], args: list[str] | None = None) -> int:
    """Parse the command line into ``main``'s parameters and call it.

    Every parameter becomes a flag with its type, default and docstring line, or, if it is a group, several flags under
    a title of their own. Flags that may be booleans can be given bare (``--resume``) or as ``--resume=false``;
    ``--config file.yaml`` reads flags from a file. A ``ValueError``, of a group's checks or from ``main``, is a user's
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
    sections: dict[str | None, Any] = {None: parser}
    for flag in flags_of(main):
        if flag.title not in sections:
            sections[flag.title] = parser.add_argument_group(flag.title)
        options: dict[str, Any] = {"type": flag.type}
        if flag.type is bool:
            options = {"action": ActionYesNo, "nargs": "?"}
        elif bool in get_args(flag.type):
            options |= {"nargs": "?", "const": True}
        required = flag.default is dataclasses.MISSING
        options |= {"required": True} if required else {"default": flag.default}
        sections[flag.title].add_argument(f"--{flag.name}", help=flag.help, **options)
    parsed = parser.parse_args(args).as_dict()
    parsed.pop("config", None)
    # Read when the GPU is first used, here and in the processes to come. The batches of a run differ in length, and in
    # blocks of fixed sizes the gaps between them took 2 to 3 GiB of a T4's 14.5 (8B model, two GPUs).
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        _check_exclusive(main, parser.parse_args(args, defaults=False).as_dict().keys())
        return main(**group_flags(main, parsed)) or 0
    except ValueError as error:
        if os.environ.get("LIGHTNING_QLORA_TRACEBACK"):
            raise
        print(f"{parser.prog}: error: {error}", file=sys.stderr, flush=True)
        return 2


def _check_exclusive(main: Callable[..., Any], given: Collection[str]) -> None:
    """Refuse flags of which a group says, in ``EXCLUSIVE``, that only one may be given.

    Raises:
        ValueError: Naming both.
    """
    for hint in get_type_hints(main, include_extras=True).values():
        for flags in getattr(_group(hint)[0], "EXCLUSIVE", ()):
            if set(flags) <= set(given):
                raise ValueError(f"{' and '.join(f'--{flag}' for flag in flags)} are both given. Give one.")


def run_again(*flags: str, **variables: str) -> int:
    """Run this script once more in a process of its own, with its own flags, ``flags`` and environment ``variables``.

    Returns:
        Its exit status, as a shell tells it: 128 and more where a signal ended it.
    """
    status = subprocess.run([sys.executable, *sys.argv, *flags], env=os.environ | variables, check=False).returncode
    return status if status >= 0 else 128 - status


def as_metadata(flags: Mapping[str, Any]) -> dict[str, Any]:
    """``flags``, which are ``locals()`` at the start of ``main``, as a report stores them.

    Returns:
        Every flag by its name, those of groups too, with paths as text.
    """
    flat: dict[str, Any] = {}
    for name, value in flags.items():
        if dataclasses.is_dataclass(value):
            flat |= as_metadata({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
        else:
            flat[name] = str(value) if isinstance(value, Path) else value
    return flat


def positive(**values: int) -> None:
    """Check that every value is at least 1.

    Raises:
        ValueError: Naming the flag that is not.
    """
    at_least(1, **values)


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


def _helps(documented: Any) -> dict[str, str]:
    """The lines of the docstring's ``Args``, by name."""
    return {p.arg_name: p.description or "" for p in parse_docstring(inspect.getdoc(documented) or "").params}


quiet_libraries()
