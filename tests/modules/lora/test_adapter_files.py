"""Adapters go to stock peft and come back, with the same logits; what does not fit is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.lora.adapter_files import (
    WEIGHTS_NAME,
    adapter_state,
    load_adapter,
    read_adapter,
    save_adapter,
)
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.models.build import build_model, materialize
from lightning_qlora.modules.models.causal_lm import QLoRAForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")

LORAS = {
    "all layers": default_lora(4),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=5,
        target_modules=r".*layers\.1\..*\.(q|k|up)_proj",
        rank_pattern={"k_proj": 2},
        alpha_pattern={"q_proj": 9},
    ),
    "two layers, rank-stabilized": LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["v_proj", "up_proj"]),
}
IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


def load(directory: Path, lora: LoraConfig) -> QLoRAForCausalLM:
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_model(checkpoint, lora)
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    return model.eval()


def randomize_lora(model: nn.Module) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS.keys())
@pytest.mark.parametrize("form", ["16-bit", "4-bit"])
@torch.no_grad()
def test_stock_peft_loads_what_is_saved_here(lora, form, tiny_llama_dir, tiny_llama_4bit_dir, dense_llama, tmp_path):
    directory = tiny_llama_dir if form == "16-bit" else tiny_llama_4bit_dir
    model = load(directory, lora)
    before = model(IDS).logits
    randomize_lora(model)
    expected = model(IDS).logits
    save_adapter(model, tmp_path / "a" / "b", lora, "some/base")

    stock = PeftModel.from_pretrained(dense_llama(directory), tmp_path / "a" / "b").eval()
    torch.testing.assert_close(stock(IDS).logits, expected, rtol=0, atol=1e-4)
    assert (expected - before).abs().max() > 0.1  # the adapter matters
    config = stock.peft_config["default"]
    assert (config.base_model_name_or_path, config.inference_mode) == ("some/base", True)
    assert sorted(p.name for p in (tmp_path / "a" / "b").glob("[!R]*")) == ["adapter_config.json", WEIGHTS_NAME]
    assert lora.base_model_name_or_path is None  # the caller's configuration is left as it was


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS.keys())
@torch.no_grad()
def test_what_stock_peft_saves_loads_here(lora, tiny_llama_dir, dense_llama, tmp_path):
    stock = get_peft_model(dense_llama(tiny_llama_dir), lora).eval()
    randomize_lora(stock)
    stock.save_pretrained(tmp_path)
    model = load(tiny_llama_dir, lora)
    load_adapter(model, tmp_path, lora)
    torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, rtol=0, atol=1e-4)


@pytest.fixture
def saved(tiny_llama_dir: Path, tmp_path: Path) -> tuple[QLoRAForCausalLM, Path]:
    """A model, and an adapter of it."""
    model = load(tiny_llama_dir, default_lora(4))
    randomize_lora(model)
    save_adapter(model, tmp_path / "adapter", default_lora(4), "base")
    return model, tmp_path / "adapter"


def test_saving_and_loading_keeps_every_bit_and_replaces_what_was_there(saved, tiny_llama_dir):
    model, directory = saved
    first = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    other = load(tiny_llama_dir, default_lora(4))
    load_adapter(other, directory, default_lora(4))
    torch.testing.assert_close(adapter_state(other), first, rtol=0, atol=0)
    assert len(first) == 2 * 2 * 7
    assert all(key.startswith("base_model.model.model.layers.") for key in first)

    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_" in n).zero_()
    save_adapter(model, directory, default_lora(4), "base", write=False)
    torch.testing.assert_close(read_adapter(directory, default_lora(4)), first, rtol=0, atol=0)
    save_adapter(model, directory, default_lora(4), "base")
    torch.testing.assert_close(read_adapter(directory, default_lora(4)), adapter_state(model), rtol=0, atol=0)


def test_a_16_bit_adapter_becomes_float32(saved, tiny_llama_dir):
    model, directory = saved
    rewrite(directory, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    load_adapter(model, directory, default_lora(4))
    assert all(t.dtype == torch.float32 and torch.equal(t, t.bfloat16().float()) for t in adapter_state(model).values())


def test_an_adapter_of_a_compiled_model_loads(saved, tiny_llama_dir):
    model, directory = saved
    names = {name: name.replace("base_model.model.", "base_model.model._orig_mod.") for name in adapter_state(model)}
    rewrite(directory, lambda tensors: [tensors.update({names[n]: tensors.pop(n)}) for n in list(tensors)])
    other = load(tiny_llama_dir, default_lora(4))
    load_adapter(other, directory, default_lora(4))
    torch.testing.assert_close(adapter_state(other), adapter_state(model), rtol=0, atol=0)


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, directory / WEIGHTS_NAME)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # peft's, of the other type of adapter
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d), "holds no LoRA adapter of peft: adapter_config.json is missing"),
        (lambda d: (d / WEIGHTS_NAME).unlink(), "holds no LoRA adapter of peft: adapter_model.safetensors is missing"),
        (lambda d: (d / WEIGHTS_NAME).write_bytes((d / WEIGHTS_NAME).read_bytes()[:-9]), "adapter in .* is damaged"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "adapter in .* is damaged"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "adapter in .* is damaged"),
        (lambda d: change_config(d, peft_type="IA3"), "is a .*IA3 adapter. Only LoRA"),
        (lambda d: change_config(d, init_lora_weights="pissa"), "'pissa', which changed the base.*Convert it"),
        (lambda d: change_config(d, use_dora=True), "has use_dora=True, which is more than a product"),
        (lambda d: change_config(d, alora_invocation_tokens=[5]), r"has alora_invocation_tokens=\[5\], which is more"),
        (lambda d: change_config(d, bias="lora_only"), "has bias='lora_only', which is more"),
        (lambda d: change_config(d, r=8), "has r=8, this run r=4. Use the same"),
        (lambda d: change_config(d, lora_alpha=16), "has lora_alpha=16, this run lora_alpha=8"),
        (lambda d: change_config(d, use_rslora=True), "has use_rslora=True"),
        (lambda d: change_config(d, alpha_pattern={"q_proj": 2}), r"has alpha_pattern=\{'q_proj': 2\}"),
        (lambda d: rewrite(d, lambda t: t.pop(Q)), f"lacks '{Q}', which the model needs.*use its own target"),
        (lambda d: rewrite(d, lambda t: t.update(more=t[Q].clone())), "holds 'more', which the model does not take"),
        (lambda d: rewrite(d, lambda t: t.update({Q: torch.zeros(4, 7)})), rf"'{Q}' has shape \(4, 7\), not \(4, 64\)"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(saved, damage, message):
    model, directory = saved
    before = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    damage(directory)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, directory, default_lora(4))
    assert str(directory) in str(error.value)
    torch.testing.assert_close(adapter_state(model), before, rtol=0, atol=0)
