"""Each recipe stands by itself: what two of them need is in the library."""

import ast
from pathlib import Path

import pytest

from tests.recipes.runs import RECIPES


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_imports_no_other_and_no_benchmark(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert "lightning_qlora" in imported
    assert not imported & {"benchmarks", "recipes", *(other.stem for other in RECIPES.rglob("*.py"))}
