"""Models out: an adapter merged into its base."""

from typing import TYPE_CHECKING

from ..lazy import import_on_first_use

if TYPE_CHECKING:
    from .merge import Merged, merge_adapter
else:
    __getattr__, __dir__ = import_on_first_use(__name__)

__all__ = ["Merged", "merge_adapter"]
