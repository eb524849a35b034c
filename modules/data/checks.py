"""What the data pipeline refuses: arguments out of range, bad rows, and a checkpoint of other data."""

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn

#: How many reasons, and how many rows for each, a message names.
_NAMED = 10


def require_at_least(**values_and_least: tuple[int, int]) -> None:
    """Check arguments given as ``name=(value, least)``.

    Raises:
        ValueError: Naming the first argument that is below its least value.
    """
    for name, (value, least) in values_and_least.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def refuse_changes(saved: Mapping[str, object], current: Mapping[str, object]) -> None:
    """Check that this run has the data and the order that a checkpoint was made for.

    Raises:
        ValueError: Naming each value of ``current`` that ``saved`` has otherwise or lacks.
    """
    changed = [f"{key} {saved.get(key)} -> {value}" for key, value in current.items() if saved.get(key) != value]
    if changed:
        raise ValueError(
            f"the checkpoint's place in the data does not fit this run ({', '.join(changed)}): samples would be "
            "repeated or left out; resume with the same data, seq_len, packing, seed and batch_size * devices, or "
            "start a new run"
        )


class BadRows:
    """Collects what is wrong with rows, so that a user is told of all of them at once.

    Args:
        source: The data set, as messages name it.
        skip: Leave bad rows out with a warning, instead of refusing the data set.
    """

    def __init__(self, source: str, skip: bool) -> None:
        self.source, self.skip = source, skip
        self.count = 0
        self._reasons: dict[str, list[str]] = {}

    def add(self, where: str, error: Exception | str) -> None:
        """Note a bad row: ``where`` it stands in its source, as in ``"line 3"``, and what is wrong with it."""
        self.count += 1
        places = self._reasons.setdefault(str(error), [])
        if len(places) <= _NAMED:
            places.append(where)

    def settle(self, rows: int) -> None:
        """Refuse the bad ones of ``rows`` rows, or say that they are left out.

        Raises:
            ValueError: If there are any and ``skip`` is off, or no other row is left. Both messages name the first ten.
        """
        if not self.count:
            return
        named = [f"  {_first(places)}: {reason}" for reason, places in list(self._reasons.items())[:_NAMED]]
        if len(self._reasons) > _NAMED:
            named.append(f"  ... and {len(self._reasons) - _NAMED} more reasons")
        listed = "\n".join(named)
        if not self.skip:
            raise ValueError(
                f"{self.source}: {self.count} of {rows} rows cannot be trained on:\n{listed}\n"
                "Mend or remove them, or leave them out with --skip_bad_rows."
            )
        if self.count == rows:
            raise ValueError(f"{self.source}: none of its {rows} rows can be trained on:\n{listed}")
        rank_zero_warn(f"{self.source}: {self.count} of {rows} rows are left out (--skip_bad_rows):\n{listed}")


def _first(places: list[str]) -> str:
    return ", ".join(places[:_NAMED]) + (", ..." if len(places) > _NAMED else "")
