"""LightningCLI builds the library's classes from the YAML file of the recipes, and trains."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("no_group_left", "one_thread")
def test_the_file_of_the_recipes_trains(
    tiny_llama_dir: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = {
        "config": ROOT / "recipes/config.yaml", "model.model_dir": tiny_llama_dir, "data.tokenizer": tiny_llama_dir,
        "data.dataset": chats, "trainer.max_steps": 2, "trainer.accelerator": "cpu", "trainer.logger": "false",
    }  # fmt: skip
    argv = ["lightning_cli.py", "fit", *(f"--{name}={value}" for name, value in flags.items())]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(ROOT / "recipes/lightning_cli.py"), run_name="__main__")
    report = json.loads((tmp_path / "runs/lightning_cli/report.json").read_text())
    assert report["status"] == "completed"
    assert len(report["losses"]) == 2
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    settings = yaml.safe_load(Path("config.yaml").read_text())
    assert settings["model"]["lora"]["init_args"]["r"] == 16
    assert settings["trainer"]["strategy"]["class_path"] == "lightning_qlora.modules.FSDP2Strategy"
    assert checkpoint.is_file()
