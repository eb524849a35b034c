"""What groups of options share.

A group is a frozen dataclass whose fields are flags of the recipes: each field has a default and a line in the
docstring's ``Args``, and ``__post_init__`` checks the values, so that whoever builds the group is told what a user of
the command line is told. :func:`~lightning_qlora.modules.cli.run_recipe` makes the flags.
"""

from __future__ import annotations

from typing import Literal

#: What a text is given, under transformers' names: one of several classes, any number of labels, or numbers.
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


def at_least(least: int, **values: int) -> None:
    """Check that every value is at least ``least``.

    Raises:
        ValueError: Naming the flag that is not.
    """
    for name, value in values.items():
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}.")
