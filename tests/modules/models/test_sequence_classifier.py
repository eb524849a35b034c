"""Sequence classifiers equal those of stock transformers and peft; padding, packing and pad tokens change nothing."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.lora.adapter_files import load_adapter, save_adapter
from lightning_qlora.modules.lora.config import default_lora, with_head, with_targets
from lightning_qlora.modules.models.build import build_model, materialize
from lightning_qlora.modules.models.families import FAMILIES, Family
from lightning_qlora.modules.models.sequence_classifier import ClassificationHead, QLoRAForSequenceClassification
from lightning_qlora.modules.quantization.nf4_linear import NF4Linear
from tests.modules.models.test_families import attention_for, gradients, save

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD = ClassificationHead(3)
PAD = 0
LENGTHS = [7, 12, 1, 9]


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2"])
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def directory(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp(family.model_type), family)


def lora(family: Family) -> LoraConfig:
    return with_head(with_targets(default_lora(4), family.projections), HEAD.trained_modules, HEAD.task_type)


def load(directory: Path, family: Family, backend: str | None = None, **options: Any) -> QLoRAForSequenceClassification:
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_model(checkpoint, lora(family), head=HEAD, **{"attention": attention_for(family), **options})
    if backend is not None:
        model.compile_regions(backend=backend)
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    assert isinstance(model, QLoRAForSequenceClassification)
    for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if "lora_B" in name or name == "score.weight":
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1
            parameter.data.copy_(values)
    return model.train()


@pytest.fixture(scope="module")
def model(directory: Path, family: Family) -> QLoRAForSequenceClassification:
    return load(directory, family)


def stock(directory: Path, model: nn.Module) -> PreTrainedModel:
    """transformers' own classifier, in float32, on the same dequantized weights."""
    found = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", num_labels=3, pad_token_id=PAD
    )
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, NF4Linear):
                found.get_submodule(name.removesuffix(".base_layer")).weight.copy_(layer.dequantize())
    return found


@pytest.fixture(scope="module")
def peer(directory: Path, family: Family, model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    """Stock transformers and peft with what our model saved."""
    saved = tmp_path_factory.mktemp("adapter")
    save_adapter(model, saved, lora(family), str(directory))
    return PeftModel.from_pretrained(stock(directory, model), saved, is_trainable=True)


def texts() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (length,), generator=draw) for length in LENGTHS]


def padded(side: str) -> dict[str, Tensor]:
    """The texts as rows [4, 12] with their mask."""
    ids, mask = torch.full((4, 12), PAD), torch.zeros(4, 12, dtype=torch.int64)
    for row, text in enumerate(texts()):
        place = slice(0, len(text)) if side == "right" else slice(12 - len(text), 12)
        ids[row, place], mask[row, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def ends() -> Tensor:
    return torch.arange(4) * 12 + torch.tensor(LENGTHS) - 1


def test_logits_loss_and_gradients_are_those_of_transformers_and_peft(model, peer):
    labels = torch.tensor([0, 2, 1, 1])
    expected = peer.train()(**padded("right"), labels=labels)
    logits = model(input_ids=padded("right")["input_ids"], last_tokens=ends()).logits
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    loss = nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.loss.backward()
    theirs = {
        name.replace("score.modules_to_save.default", "score"): gradient for name, gradient in gradients(peer).items()
    }
    ours = gradients(model)
    assert ours.keys() == theirs.keys()
    assert "score.weight" in ours
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_padding_on_either_side_packing_and_embeddings_give_the_logits_of_each_text_alone(model):
    alone = torch.cat([model(input_ids=text[None]).logits for text in texts()])
    right, left = padded("right"), padded("left")
    # Texts may hold the pad token, and end with it: what counts is the mask.
    found = {
        "right": model(**right),
        "left": model(**left),
        "embeddings": model(
            inputs_embeds=model.model.embed_tokens(left["input_ids"]), attention_mask=left["attention_mask"]
        ),
    }
    rows = torch.stack([torch.cat(texts()[:2]), torch.cat([*texts()[2:], torch.full((9,), PAD)])])
    lengths = [LENGTHS[:2], [*LENGTHS[2:], 9]]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    packed = {"input_ids": rows, "position_ids": positions, "document_lengths": lengths}
    found["packed"] = model(**packed, last_tokens=torch.tensor([6, 18, 19, 28]))
    every = model(**packed).logits
    torch.testing.assert_close(every[:4], alone, rtol=1e-5, atol=1e-5)
    assert len(every) == 5, "padding is a document too"
    for name, output in found.items():
        torch.testing.assert_close(output.logits, alone, rtol=1e-5, atol=1e-5, msg=name)


@torch.no_grad()
def test_a_text_that_ends_with_the_pad_token_is_read_to_its_end(model):
    text = torch.tensor([[5, 9, PAD]])
    row = torch.tensor([[5, 9, PAD, PAD, PAD]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(model(input_ids=row, attention_mask=mask).logits, model(input_ids=text).logits)
    with pytest.raises(ValueError, match="A row of attention_mask has no 1"):
        model(input_ids=row, attention_mask=mask * 0)


@torch.no_grad()
def test_an_adapter_that_peft_trained_gives_its_logits_here(directory, family, model, tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(family.projections), task_type="SEQ_CLS", init_lora_weights=True
    )
    theirs = get_peft_model(stock(directory, model), config).eval()
    for number, (name, parameter) in enumerate(sorted(theirs.named_parameters())):
        if "lora_B" in name or "modules_to_save" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number + 7)) * 0.1)
    theirs.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]) == {"classifier", "score"}
    ours = copy.deepcopy(model).eval()
    load_adapter(ours, tmp_path, lora(family))
    torch.testing.assert_close(ours(**padded("right")).logits, theirs(**padded("right")).logits, rtol=1e-5, atol=1e-5)


def test_the_head_stays_in_float32_and_computes_in_it(directory, family):
    model = load(directory, family, dtype=torch.bfloat16).to(torch.bfloat16)
    assert model.score.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=texts()[0][None]).logits
    assert logits.dtype == torch.float32
    assert [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name] == ["score.weight"]


def test_compiled_layers_give_the_same_step_on_packed_rows(tmp_path, fresh_graphs):
    llama = FAMILIES["llama"]
    directory = save(tmp_path, llama)
    lengths = [LENGTHS[:2], [*LENGTHS[2:], 9]]
    packed = {
        "input_ids": torch.stack([torch.cat(texts()[:2]), torch.cat([*texts()[2:], torch.full((9,), PAD)])]),
        "position_ids": torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths]),
        "document_lengths": lengths,
        "last_tokens": torch.tensor([6, 18, 19, 28]),
    }
    found = []
    for backend in (None, "aot_eager"):
        model = load(directory, llama, backend)
        loss = nn.functional.cross_entropy(model(**packed).logits, torch.tensor([0, 2, 1, 1]))
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (eager, expected), (compiled, ours) = found
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
