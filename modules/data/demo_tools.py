"""Eight small tools for the demonstration of tool calls: Python functions that a recipe really runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import date, timedelta
from typing import Any

_METRES = {"metres": 1.0, "kilometres": 1000.0, "miles": 1609.344, "yards": 0.9144, "feet": 0.3048, "inches": 0.0254}
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def convert_length(value: float, source: str, target: str) -> float:
    """Convert a length.

    Args:
        value: length
        source: its unit
        target: unit wanted

    Raises:
        ValueError: For units other than metres, kilometres, miles, yards, feet and inches.
    """
    for unit in (source, target):
        if unit not in _METRES:
            raise ValueError(f"unknown unit {unit!r}; known are {', '.join(_METRES)}")
    return round(value * _METRES[source] / _METRES[target], 2)


def convert_temperature(value: float, source: str, target: str) -> float:
    """Convert a temperature.

    Args:
        value: temperature
        source: its unit
        target: unit wanted

    Raises:
        ValueError: For units other than celsius, fahrenheit and kelvin.
    """
    to_kelvin = {"celsius": (1.0, 273.15), "fahrenheit": (5 / 9, 459.67 * 5 / 9), "kelvin": (1.0, 0.0)}
    for unit in (source, target):
        if unit not in to_kelvin:
            raise ValueError(f"unknown unit {unit!r}; known are {', '.join(to_kelvin)}")
    (scale, shift), (other_scale, other_shift) = to_kelvin[source], to_kelvin[target]
    return round((value * scale + shift - other_shift) / other_scale, 2)


def days_between(start: str, end: str) -> int:
    """Count the days between two dates.

    Args:
        start: first date
        end: last date

    Raises:
        ValueError: For dates that are not written as in 2024-03-17.
    """
    return (date.fromisoformat(end) - date.fromisoformat(start)).days


def add_days(day: str, count: int) -> str:
    """Date a number of days later.

    Args:
        day: date
        count: days

    Raises:
        ValueError: For a date that is not written as in 2024-03-17, or a count that leaves the calendar.
    """
    try:
        return (date.fromisoformat(day) + timedelta(days=count)).isoformat()
    except OverflowError as error:
        raise ValueError(str(error)) from error


def weekday(day: str) -> str:
    """Day of the week.

    Args:
        day: date

    Raises:
        ValueError: For a date that is not written as in 2024-03-17.
    """
    return _WEEKDAYS[date.fromisoformat(day).weekday()]


def count_words(text: str) -> int:
    """Count the words of a text.

    Args:
        text: text
    """
    return len(text.split())


def percentage(percent: float, number: float) -> float:
    """Take a percentage of a number.

    Args:
        percent: percent
        number: number
    """
    return round(percent * number / 100, 2)


def common_divisor(first: int, second: int) -> int:
    """Greatest common divisor.

    Args:
        first: number
        second: number
    """
    return math.gcd(first, second)


#: Each tool by its name.
DEMO_TOOLS: dict[str, Callable[..., Any]] = {
    tool.__name__: tool
    for tool in (
        convert_length, convert_temperature, days_between, add_days, weekday, count_words, percentage, common_divisor,
    )
}  # fmt: skip
