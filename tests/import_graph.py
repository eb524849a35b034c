"""What the files of this repository import, read from their source: nothing is run."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("kernels", "modules", "callbacks", "recipes")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
"""Dotted name of each file, without ``lightning_qlora.``, and its path. A package's name is its ``__init__.py``."""


def imports(importer: str) -> Iterator[tuple[str, str]]:
    """Yield (module, name) for everything that a file of ``FILES`` imports, inside functions too.

    For ``from a import b``, ``module`` is ``a`` and ``name`` is ``b``; for ``import a`` the name is empty. Relative
    imports are made absolute, and ``lightning_qlora.`` is left out.
    """
    path = FILES[importer]
    package = importer.split(".") if path.name == "__init__.py" else importer.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.removeprefix("lightning_qlora."), "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])]).removeprefix("lightning_qlora.")
            yield from ((module, alias.name) for alias in node.names)


def own_file(importer: str, module: str, name: str) -> str | None:
    """Return the key of ``FILES`` that an import of ``importer`` reads, ``None`` if it is not a file of ours."""
    # A script finds its neighbours by their bare names, because Python puts its folder first in sys.path.
    folders = ("", f"{importer.rpartition('.')[0]}.") if importer.startswith("recipes.") else ("",)
    candidates = [f"{folder}{file}" for file in (f"{module}.{name}", module) for folder in folders]
    return next((file for file in candidates if file in FILES), None)
