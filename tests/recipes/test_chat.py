"""recipes/chat.py: what was trained answers, over several turns, as stock peft's model does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.export.weights import FinetunedWeights
from lightning_qlora.modules.lora.adapter_files import save_adapter
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.models.build import build_model, materialize
from tests.recipes.runs import recipe_module

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def adapter(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one that changes every answer."""
    checkpoint = SafetensorsCheckpoint(tiny_llama_dir)
    model = build_model(checkpoint, default_lora(4))
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(model, directory, default_lora(4), str(tiny_llama_dir))
    return directory


def answer_of_peft(base: Path, adapter: Path | None, messages: list[dict[str, str]], tokens: int) -> str:
    """Greedy, by transformers and peft, on the base's dequantized weights."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = FinetunedWeights(base, quantize_base=True)
    model.load_state_dict({name: weights.base(name).float() for name in weights.shapes}, strict=False)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = model.eval().generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def test_a_chat_goes_on_and_begins_anew(tiny_llama_dir, adapter, monkeypatch):
    chat = recipe_module("chat")
    typed: Iterator[str] = iter(["what is the name", "a thing", "/new", "what is the name", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    said: list[str] = []
    generate = chat.generate_answer
    monkeypatch.setattr(chat, "generate_answer", lambda *a, **k: said.append(generate(*a, **k)) or said[-1])
    chat.main(adapter=adapter, max_new_tokens=8)
    first = [{"role": "user", "content": "what is the name"}]
    then = [*first, {"role": "assistant", "content": said[0]}, {"role": "user", "content": "a thing"}]
    expected = [answer_of_peft(tiny_llama_dir, adapter, messages, 8) for messages in (first, then)]
    assert said == [*expected, expected[0]]
    assert answer_of_peft(tiny_llama_dir, None, first, 8) != expected[0]


def test_one_prompt_without_an_adapter(tiny_llama_dir, capsys):
    chat = recipe_module("chat")
    chat.main(model=str(tiny_llama_dir), prompt="a thing", max_new_tokens=6)
    expected = answer_of_peft(tiny_llama_dir, None, [{"role": "user", "content": "a thing"}], 6)
    assert capsys.readouterr().out.strip() == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [({}, "Pass --adapter, or --model"), ({"model": "x", "temperature": -1.0}, "--temperature 0 or above")],
)
def test_what_makes_no_sense_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        recipe_module("chat").main(**flags)
