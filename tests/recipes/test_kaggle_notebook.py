"""The Kaggle notebook, run from its first cell to its last with a tiny model on two CPU processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lightning_qlora.callbacks import load_report

REPOSITORY = Path(__file__).resolve().parents[2]


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
