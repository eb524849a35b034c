"""The merge recipe by its command line: what it writes, says and refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lightning_qlora.modules.cli import run_recipe
from lightning_qlora.modules.lora.config import default_lora
from tests.recipes.runs import recipe_module

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def merge(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """``merge(*flags)`` runs the recipe and returns its exit status and all that it printed."""
    recipe = recipe_module("merge_adapter")

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
    assert "The base is not quantized." in said
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
    assert "The base is what its 4-bit weights stand for." in said
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


def test_a_prompt_without_tokens_is_refused(merge, adapter, tmp_path):
    status, said = merge("--adapter", adapter, "--output_dir", tmp_path / "out", "--prompt", "")
    assert (status, said.count("\n")) == (2, 1)
    assert "--prompt has no tokens" in said
    assert not (tmp_path / "out").exists()


def name_base(adapter: Path, name: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(name)}))


def test_a_4_bit_base_of_the_adapters_own_name_is_what_it_was_trained_on(merge, adapter, tiny_llama_4bit_dir, tmp_path):
    # Trained on a directory of that name on another machine.
    name_base(adapter, f"/elsewhere/{tiny_llama_4bit_dir.name}")
    flags = ("--adapter", adapter, "--output_dir", tmp_path / "out", "--model", tiny_llama_4bit_dir, "--check=false")
    status, said = merge(*flags)
    assert status == 0
    assert "which is what the adapter was trained on." in said
    assert "warning" not in said


def test_a_link_is_its_target(merge, adapter, tiny_llama_dir, tmp_path):
    (tmp_path / "link").symlink_to(tiny_llama_dir)
    status, said = merge(
        "--adapter", adapter, "--output_dir", tmp_path / "out", "--model", tmp_path / "link", "--check=false"
    )  # fmt: skip
    assert status == 0
    assert "warning" not in said


def test_a_base_that_is_gone_is_the_adapters_and_not_the_users_mistake(merge, adapter, tmp_path):
    name_base(adapter, "/gone/model")
    status, said = merge("--adapter", adapter, "--output_dir", tmp_path / "out")
    assert (status, said.count("\n")) == (2, 1)
    assert "'/gone/model'" in said
    assert "pass --model" in said
    status, said = merge("--adapter", adapter, "--output_dir", tmp_path / "out", "--model", "/also/gone")
    assert status == 2
    assert "'/also/gone'" in said
    assert "pass --model" not in said


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("", "adapter"),
        ("checkpoints/step=6.ckpt", "adapters/step=6"),
        ("checkpoints/interrupted-step=6.ckpt", "adapters/step=6"),
        ("checkpoints/step=7.ckpt", "adapter"),
        ("checkpoints", None),
        ("elsewhere", None),
    ],
)
def test_of_a_run_the_adapter_is_named(merge, tmp_path, given, meant):
    run = tmp_path / "run"
    for directory in ("adapter", "adapters/step=6"):
        (run / directory).mkdir(parents=True)
        (run / directory / "adapter_config.json").write_text("{}")
    status, said = merge("--adapter", run / given, "--output_dir", tmp_path / "out")
    assert (status, said.count("\n")) == (2, 1)
    assert f"{run / given} holds no LoRA adapter of peft" in said
    assert ("Did you mean" in said) == (meant is not None)
    if meant:
        assert f"Did you mean {run / meant}?" in said
