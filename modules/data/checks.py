"""What the data pipeline refuses: arguments out of range, and a checkpoint of other data."""

from collections.abc import Mapping


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
