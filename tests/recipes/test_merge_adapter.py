"""The merge recipe by its command line: what it writes, says and refuses."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lightning_qlora.modules.cli import run_recipe
from lightning_qlora.modules.llama import default_lora

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "merge_adapter.py"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def merge(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """``merge(*flags)`` runs the recipe and returns its exit status and all that it printed."""
    spec = importlib.util.spec_from_file_location("merge_adapter_recipe", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe
    spec.loader.exec_module(recipe)

    def run(*flags: object) -> tuple[int, str]:
        capfd.readouterr()
        status = run_recipe(recipe.main, [str(flag) for flag in flags])
        captured = capfd.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.fixture
def adapter(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_llama_dir), default_lora(4))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_it_merges_into_the_base_that_the_adapter_names(merge, adapter, tiny_llama_dir, tmp_path):
    out = tmp_path / "merged"
    status, said = merge("--adapter", adapter, "--output_dir", out, "--dtype", "float16", "--max_shard_size", "100KB")
    assert status == 0
    assert "14 weights merged, float16, 0.00 GiB in" in said
    assert "The base is the 16-bit one" in said
    assert "Logits differ from those of base and adapter by at most 0.0" in said
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float16
    answer = model.generate(**AutoTokenizer.from_pretrained(out)("what is", return_tensors="pt"), max_new_tokens=3)
    assert answer.shape[0] == 1


def test_a_4_bit_base_another_name_and_no_check_are_said(merge, adapter, tiny_llama_4bit_dir, tmp_path):
    status, said = merge(
        "--adapter", adapter, "--output_dir", tmp_path / "out", "--model", tiny_llama_4bit_dir, "--check=false"
    )  # fmt: skip
    assert status == 0
    assert f"warning: the adapter was trained on {json_value(adapter)}, not on {tiny_llama_4bit_dir}" in said
    assert "The base is what its 4-bit weights stand for" in said
    assert "Logits were not checked." in said
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def json_value(adapter: Path) -> str:
    return str(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])


def test_mistakes_end_with_one_line(merge, adapter, tmp_path):
    status, said = merge("--adapter", tmp_path, "--output_dir", tmp_path / "out")
    assert (status, said.count("\n")) == (2, 1)
    assert "holds no LoRA adapter of peft" in said
    status, said = merge("--adapter", adapter, "--output_dir", adapter)
    assert status == 2
    assert "exists already. Name a new directory." in said
    status, said = merge("--adapter", adapter, "--output_dir", tmp_path / "out", "--max_shard_size", "many")
    assert status == 2
    assert "many" in said
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    status, said = merge("--adapter", adapter, "--output_dir", tmp_path / "out")
    assert status == 2
    assert "does not name its base. Pass --model." in said
