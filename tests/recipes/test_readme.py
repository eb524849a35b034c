"""The README says what is true: its tables come from records, its Python runs, its links lead somewhere."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {page: (ROOT / page).read_text() for page in ("README.md", "recipes/README.md", "recipes/benchmarks/README.md")}
README = PAGES["README.md"]
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_generated_tables_are_up_to_date() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "recipes/benchmarks/record.py", "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_stale_table_is_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "recipes" / "benchmarks"
    (copy / "results").mkdir(parents=True)
    (copy / "record.py").write_text((ROOT / "recipes/benchmarks/record.py").read_text())
    record = {"name": "x", "date": "2026-01-01", "commit": "abc", "device": "d", "versions": {}, "notes": ""}
    (copy / "results/x.json").write_text(json.dumps({**record, "columns": ["a"], "rows": [[1.0], [None]]}))
    (tmp_path / "README.md").write_text("before\n<!-- results: x -->\nold\n<!-- end -->\nafter\n")

    def run(*flags: str) -> int:
        return subprocess.run([sys.executable, copy / "record.py", *flags], capture_output=True).returncode

    assert run("--check") == 1
    assert run() == 0
    assert run("--check") == 0
    text = (tmp_path / "README.md").read_text()
    assert "| a |\n| --- |\n| 1 |\n|  |" in text
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGES[page])
    paths = re.findall(r"((?:recipes|kernels|modules)/[\w/]+\.py)\b", PAGES[page])
    assert paths
    for path in [(ROOT / page).parent / link for link in links] + [ROOT / path for path in paths]:
        assert path.exists(), path


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150, "Move what does not fit to recipes/README.md or to docstrings."


def test_every_recipe_is_named() -> None:
    recipes = {path.name for path in (ROOT / "recipes").iterdir() if path.suffix in (".py", ".ipynb")}
    assert recipes == set(re.findall(r"^\| \[`recipes/([\w.]+)`\]", README, re.MULTILINE))


def test_modules_named_can_be_imported() -> None:
    names = re.findall(r"`lightning_qlora\.((?:kernels|modules|callbacks)(?:\.\w+)?)`", "".join(PAGES.values()))
    assert len(names) > 3
    for name in names:
        assert find_spec(f"lightning_qlora.{name}"), name


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for document in (*PAGES.values(), (ROOT / "CONTRIBUTING.md").read_text()):
        for target in re.findall(r"make (\w+)", document):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.slow
@pytest.mark.usefixtures("no_group_left")
def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train as the README's project does, then load that adapter as the README's peft example does."""
    peft_example, project = BLOCKS
    words = ("red", "green", "blue", "white", "black", "grey", "pink", "brown", "olive", "teal")
    rows = [{"instruction": f"Say {word}.", "response": f"{word}!"} for word in words * 2]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "example.py"
    script.write_text(project)
    runpy.run_path(str(script), run_name="__main__")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["status"] == "completed"
    assert len(report["losses"]) == 2
    script.write_text(peft_example.replace("runs/fsdp2_qlora/adapter", "adapter"))
    loaded = runpy.run_path(str(script), run_name="__main__")["model"]
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == 7 * 30
