"""Public names of a package that are imported at their first use.

Otherwise ``import lightning_qlora.modules`` would import transformers, peft and Lightning, which takes ten seconds, and
so would the import of any file below it, because Python runs a package's ``__init__`` first. The package lists its
names in plain imports, which editors and type checkers read; at run time they are made here::

    if TYPE_CHECKING:
        from .data_module import ChatDataModule
    else:
        __getattr__, __dir__ = import_on_first_use(__name__)

    __all__ = ["ChatDataModule"]
"""

import ast
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


def import_on_first_use(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` (PEP 562) of a package.

    Args:
        package: Its ``__name__``. The names are those that its ``__init__.py`` imports under ``if TYPE_CHECKING:``, by
            ``from .file import name`` or, for a package below it, ``from . import name``.
    """
    module = sys.modules[package]

    @cache
    def homes() -> dict[str, str | None]:
        """For each name the module to import it from; ``None`` if it is itself a package below this one."""
        assert module.__file__ is not None
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        block = next(node for node in tree.body if isinstance(node, ast.If))
        imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
        return {alias.name: node.module for node in imports for alias in node.names}

    def getattr_(name: str) -> Any:
        if name.startswith("__") or name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes()[name]
        value = (
            import_module(f".{name}", package) if home is None else getattr(import_module(f".{home}", package), name)
        )
        setattr(module, name, value)  # the next access does not come here
        return value

    def dir_() -> list[str]:
        return sorted({*vars(module), *homes()})

    return getattr_, dir_
