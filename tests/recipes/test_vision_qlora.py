"""The recipe with a tiny Llava on images of two colours: it learns to name them, and everything is written."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from lightning_qlora.callbacks.report import load_report
from tests.distributed import RankPools
from tests.recipes.runs import call, difference, recipe_module, train_in_pool
from tests.vision import save_vision_model

pytestmark = pytest.mark.usefixtures("one_thread", "no_group_left")


def save_model(directory: Path, family: str) -> Path:
    config, _ = save_vision_model(directory, family)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Images of light and dark colours, a fifth of the rows without any."""
    folder = tmp_path_factory.mktemp("colours")
    draw = torch.Generator().manual_seed(0)
    rows = []
    for number in range(100):
        light = number % 2 == 0
        shade = int(torch.randint(170 if light else 0, 256 if light else 90, (1,), generator=draw))
        Image.new("RGB", (20 + number % 7, 24), (shade, shade, shade)).save(folder / f"{number}.png")
        rows.append({
            "question": f"which? {number % 10}", "answer": "light" if light else "dark", "image": f"{number}.png",
        } if number % 5 else {"question": f"say {number}", "answer": "no image"})  # fmt: skip
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(save_model(folder / "model", "llava-siglip")), "dataset": str(data), "max_steps": 40, "lr": 1e-2,
        "batch_size": 16, "seq_len": 64, "lora_r": 8, "precision": "32-true", "val_samples": 10,
    }  # fmt: skip


def test_training_learns_and_everything_is_written(
    flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, output = recipe_module("vision_qlora"), tmp_path / "run"
    flags = {**flags, "output_dir": output, "show_samples": 2, "prompt": "which?"}
    assert call(recipe, **{**flags, "dry_run": True}) == 0
    assert "vision side" in capsys.readouterr().out
    assert not output.exists()

    assert call(recipe, **flags) == 0
    printed = capsys.readouterr().out
    assert "Exact match before training: 0 of 10 held-out samples (0.0%)" in printed
    report = load_report(output / "report.json")
    assert report["status"] == "completed"
    sections = report["sections"]
    assert sections["data"]["samples_with_images"] == 80
    assert sections["data"]["image_tokens"] == {"min": 9, "median": 9, "max": 9}
    exact = sections["exact_match"]
    assert exact["before training"] == {"samples": 10, "exact": 0}
    assert exact["after training"]["samples"] == 10
    assert exact["after training"]["exact"] >= 8
    page = (output / "report.html").read_text()
    assert "<mark>dark&lt;|im_end|&gt;</mark>" in page or "<mark>light&lt;|im_end|&gt;</mark>" in page
    assert "&lt;image&gt; x 9" in page
    assert "Exact match" in page
    weights = load_file(output / "adapter" / "adapter_model.safetensors")
    assert any("multi_modal_projector" in name for name in weights)
    assert any("lora_A" in name for name in weights)


def test_bad_images_are_refused_before_a_model_is_built(flags: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"question": "which?", "answer": "light", "image": "gone.png"}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match=r"1 of 1 rows cannot be trained on:\n  line 1: the image .*gone.png cannot be"
    ):
        call(
            recipe_module("vision_qlora"), **{**flags, "dataset": str(data), "output_dir": tmp_path / "run"}
        )  # fmt: skip


def test_two_ranks_train_as_one(flags: dict[str, Any], tmp_path: Path, ranks: RankPools) -> None:
    """The same batches of about equal cost, dealt to one rank or to two."""
    few = {**flags, "max_steps": 7, "strategy": "fsdp2"}
    one = train_in_pool(
        ranks, 1, {**few, "devices": 1, "batch_size": 2, "output_dir": tmp_path / "one"}, recipe="vision_qlora"
    )
    two = train_in_pool(
        ranks, 2, {**few, "devices": 2, "batch_size": 1, "output_dir": tmp_path / "two"}, recipe="vision_qlora"
    )
    assert difference(two["losses"], one["losses"]) < 1e-4
    assert one["sections"]["exact_match"]["before training"]["samples"] == 10
    assert two["sections"]["exact_match"]["before training"]["samples"] >= 8


@pytest.mark.parametrize(
    "family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "gemma3", "pixtral", "llava"]
)
def test_each_familys_model_takes_its_batches(family: str, flags: dict[str, Any], tmp_path: Path) -> None:
    """Batches of three, with samples of no image, one and two."""
    folder = Path(flags["dataset"]).parent
    images = [[], ["1.png"], ["2.png", "3.png"]]
    rows = [{"question": f"what {i}?", "answer": "light", "images": images[i % 3]} for i in range(12)]
    data = folder / "few.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = {"dataset": str(data), "max_steps": 1, "accumulate": 4, "batch_size": 3, "seq_len": 512}
    model = save_model(tmp_path / "model", family)
    assert (
        call(recipe_module("vision_qlora"), **{**flags, **few, "model": str(model), "output_dir": tmp_path / "run"})
        == 0
    )
    report = load_report(tmp_path / "run" / "report.json")
    assert math.isfinite(report["losses"][0])
    assert report["sections"]["data"]["samples_with_images"] == 8
    assert report["sections"]["exact_match"]["after training"]["samples"] == 1
