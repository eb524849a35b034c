"""The GGUF recipe by its command line: what it writes, says and refuses."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader

from lightning_qlora.modules.cli import run_recipe
from lightning_qlora.modules.lora.config import default_lora
from tests.modules.export.gguf_models import save_adapter
from tests.modules.export.vision_models import save_vision_model
from tests.recipes.runs import recipe_module

pytest.importorskip("xllamacpp", reason="needs the extra llama.cpp")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def export(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """``export(*flags)`` runs the recipe and returns its exit status and all that it printed."""
    recipe = recipe_module("export_gguf")
    handler = signal.getsignal(signal.SIGTERM)

    def run(*flags: object) -> tuple[int, str]:
        capfd.readouterr()
        try:
            status = run_recipe(recipe.main, [str(flag) for flag in flags])
        finally:
            signal.signal(signal.SIGTERM, handler)
        captured = capfd.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.fixture(scope="module")
def adapter(tiny_llama_dir: Path) -> Path:
    return save_adapter(tiny_llama_dir, default_lora(4))


def test_two_types_of_the_base_that_the_adapter_names(export, adapter, tmp_path):
    status, said = export("--adapter", adapter, "--type", "f16,q8_0", "--output", tmp_path / "m.gguf")
    assert status == 0, said
    assert {path.name for path in tmp_path.iterdir()} == {"m-f16.gguf", "m-q8_0.gguf"}
    assert "m-f16.gguf: 14 adapted weights; tensors: 16 F16, 5 F32." in said
    assert "Answers end at '<|im_end|>'." in said
    assert "100 % of 0.00 GiB" in said
    rows = [line.split("│") for line in said.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["f16", "q8_0"]
    f16, q8_0 = (float(row[4]) for row in rows)
    assert 0 <= f16 < 1e-5 < q8_0 < 0.01
    assert rows[0][5].strip() == "100.0%"
    assert "Not verified" not in said


def test_the_adapter_alone(export, adapter, tmp_path):
    base, output = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    model = adapter.parent / "untied"
    assert export("--model", model, "--output", base, "--verify=false")[0] == 0
    status, said = export("--adapter", adapter, "--adapter_only", "--output", output, "--base_gguf", base)
    assert status == 0, said
    assert len(GGUFReader(output).tensors) == 28
    assert "Not verified" not in said
    status, said = export("--adapter", adapter, "--adapter_only", "--output", tmp_path / "other.gguf")
    assert status == 0
    assert "Not verified: to run it in llama.cpp, pass --base_gguf." in said


def test_a_vision_language_model_becomes_two_files(export, tmp_path):
    model = save_vision_model(tmp_path / "model", "llava-clip")
    status, said = export("--model", model, "--output", tmp_path / "out" / "m.gguf")
    assert status == 0, said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"m.gguf", "mmproj-m.gguf"}
    assert "mmproj-m.gguf: 0 adapted weights; tensors:" in said
    rows = [[cell.strip() for cell in line.split("│")] for line in said.splitlines() if line.startswith("│")]
    assert [row[1] for row in rows] == ["f16", "f16 on images"]
    # llama.cpp's own fault with this tower, and what differs in its chats, are told.
    said = " ".join(said.split())
    assert "note: This llama.cpp misplaces the class token of CLIP towers (https://github.com/" in said
    assert "note: llama.cpp pads images to squares" in said
    assert "note: llama.cpp renders a message with an image as" in said


def test_a_4_bit_base_and_its_original(export, adapter, tiny_llama_dir, tiny_llama_4bit_dir, tmp_path):
    flags = ("--adapter", adapter, "--model", tiny_llama_4bit_dir, "--verify=false")
    status, said = export(*flags, "--output", tmp_path / "a.gguf")
    assert status == 0, said
    assert f"warning: the adapter was trained on {tiny_llama_dir}, not on {tiny_llama_4bit_dir}" in said
    assert (
        "The base is 4-bit: its weights are dequantized. --base merges into the unquantized original instead." in said
    )
    status, said = export(*flags, "--base", tiny_llama_dir, "--output", tmp_path / "b.gguf")
    assert status == 0, said
    assert f"Merged into {tiny_llama_dir}: logits differ from those with {tiny_llama_4bit_dir}" in said
    assert float(said.split("trained on, by ")[1].split(" on average")[0]) > 0.01
    assert (tmp_path / "a.gguf").read_bytes() != (tmp_path / "b.gguf").read_bytes()


def test_mistakes_end_with_one_line(export, adapter, tiny_llama_dir, tmp_path):
    output = tmp_path / "m.gguf"
    for flags, message in (
        (("--model", tiny_llama_dir, "--type", "q9"), "'q9' is no GGUF type"),
        ((), "Pass --adapter, or --model"),
        (("--adapter", tmp_path), "holds no LoRA adapter of peft"),
        (("--model", tiny_llama_dir, "--adapter_only"), "pass --adapter"),
        (("--model", tiny_llama_dir, "--adapter", adapter, "--adapter_only", "--type", "q8_0"), "write them as f32"),
    ):
        status, said = export(*flags, "--output", output)
        assert (status, said.count("\n")) == (2, 1), said
        assert message in said
    output.write_text("mine")
    status, said = export("--model", tiny_llama_dir, "--output", output)
    assert status == 2
    assert "exists already. Name another --output." in said
    _, said = export("--model", tiny_llama_dir, "--output", tmp_path / "n.gguf", "--mmproj", tmp_path / "mmproj.gguf")
    assert f"--mmproj is for the vision tower, which {tiny_llama_dir} has not." in said


def test_of_a_run_the_adapter_is_named(export, tmp_path):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    _, said = export("--adapter", tmp_path / "run", "--output", tmp_path / "m.gguf")
    assert f"Did you mean {tmp_path / 'run' / 'adapter'}?" in said


def test_a_terminated_export_leaves_nothing(export, tiny_llama_dir, tmp_path, monkeypatch):
    class Terminated:
        def __call__(self, done: int, total: int) -> None:
            assert any(tmp_path.iterdir())
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sys.modules["export_gguf_recipe"], "Tenths", Terminated)
    with pytest.raises(SystemExit) as ended:
        export("--model", tiny_llama_dir, "--output", tmp_path / "m.gguf")
    assert ended.value.code == 143
    assert list(tmp_path.iterdir()) == []
