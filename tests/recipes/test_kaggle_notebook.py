"""The Kaggle notebook, run from its first cell to its last with a tiny model on two CPU processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lightning_qlora.callbacks import load_report
from lightning_qlora.modules.environment import KEPT

REPOSITORY = Path(__file__).resolve().parents[2]

#: What to install first for the test of the install cell, e.g. "torch==2.11.0+cpu torchvision==0.26.0+cpu".
TORCH = os.environ.get("INSTALL_TORCH")


@pytest.mark.slow
def test_notebook_runs_to_its_end(
    tiny_llama_4bit_dir: Path, write_chats: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(REPOSITORY / "recipes" / "kaggle_2xt4.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    settings = {
        "MODEL": tiny_llama_4bit_dir,
        "DATASET": write_chats(24),
        "FLAGS": "--max_steps 2 --batch_size 1 --accumulate 2 --seq_len 128 --lora_r 4 --lora_alpha 8 --save_every 1",
        "REPOSITORY": REPOSITORY,
        "RUN": tmp_path / "run",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"NOTEBOOK_{name}", str(value))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of two processes with a tiny model each
    NotebookClient(notebook, timeout=400, kernel_name="python3").execute()
    report = load_report(tmp_path / "run" / "report.json")
    assert report["status"] == "completed"
    assert report["global_step"] == 2
    assert report["world_size"] == 2
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    shown = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "tokens/s on" in shown


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(TORCH is None, reason="INSTALL_TORCH names no torch to install, as in 'torch==2.11.0+cpu'")
def test_the_install_cell_keeps_the_torch_that_is_there(tmp_path: Path) -> None:
    """A new environment with a torch that constraints.txt does not name. Installs from pip's index for minutes."""
    assert TORCH is not None
    repository, environment = tmp_path / "repository", tmp_path / "environment"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "runs", "tests")
    shutil.copytree(REPOSITORY, repository, ignore=ignored)
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", *TORCH.split()], check=True)
    before = installed(python)
    constraints = (repository / "constraints.txt").read_text()
    newer = re.sub(r"(?m)^torch==.*", "torch==99.0", constraints)
    (repository / "constraints.txt").write_text(newer)
    notebook = nbformat.read(repository / "recipes" / "kaggle_2xt4.ipynb", as_version=4)
    cell = next(cell.source for cell in notebook.cells if "pip" in cell.source and cell.cell_type == "code")
    # In the process that installs, as in a notebook.
    then = "\nimport lightning_qlora.callbacks\nprint(lightning_qlora.callbacks.load_report)"
    code = f"from pathlib import Path\n{cell}{then}"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # where the package may be
    result = subprocess.run(
        [python, "-c", code], cwd=repository, env=variables, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    after = installed(python)
    assert {name: after[name] for name in KEPT if name in before} == {n: before[n] for n in KEPT if n in before}
    assert f"\ntorch {before['torch']}" in result.stdout
    assert after["lightning-qlora"]
    check = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout


def installed(python: str) -> dict[str, str]:
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )  # fmt: skip
    return {package["name"].lower(): package["version"] for package in json.loads(listed.stdout)}
