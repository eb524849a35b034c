"""Every vision-language family, on tiny random models: each equals stock transformers and peft, images or none.

LoRA adapts the tower too, the projector is trained in full, and the tower's layers are in 4 bits where they can be.
"""

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import BitsAndBytesConfig, PreTrainedModel

from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.dtensor import copy_local_rows
from lightning_qlora.modules.export.merge import merge_adapter
from lightning_qlora.modules.lora.adapter_files import load_adapter, save_adapter
from lightning_qlora.modules.lora.config import default_lora, with_head
from lightning_qlora.modules.models.build import build_model, materialize
from lightning_qlora.modules.models.families import VISION_FAMILIES, load_config
from lightning_qlora.modules.models.vision_language import (
    QLoRAForVisionLanguage,
    VisionLanguageHead,
    VisionOptions,
)
from lightning_qlora.modules.quantization.nf4_linear import NF4Linear
from lightning_qlora.modules.training.memory_plan import Settings, plan_memory
from tests.distributed import RankPools
from tests.graphs import Graphs
from tests.modules.models.test_families import gradients
from tests.vision_models import IMAGE, SHAPES, batch_of, save

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = VisionOptions(vision_lora=True, projector="full", quantize_vision=True)


#: Families whose graphs are tested on every run; the others' towers are made of the same parts.
COMPILED = ("llava", "qwen2_5_vl", "gemma3")


@pytest.fixture(scope="module", params=SHAPES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp(name), name)


def head_of(directory: Path, options: VisionOptions = ALL) -> VisionLanguageHead:
    return VisionLanguageHead.of(load_config(directory, vision=True), options)


def lora_of(directory: Path, options: VisionOptions = ALL) -> LoraConfig:
    head = head_of(directory, options)
    lora = with_head(default_lora(4), head.trained_modules, head.task_type)
    return head.with_targets(lora, load_config(directory, vision=True))


def load(directory: Path, options: VisionOptions = ALL, backend: Any = None, **settings: Any) -> QLoRAForVisionLanguage:
    """A model in training mode whose adapters all matter; compiled if a ``backend`` is given."""
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_model(checkpoint, lora_of(directory, options), head=head_of(directory, options), **settings)
    if backend is not None:
        model.compile_regions(backend=backend)
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    randomize(model)
    assert isinstance(model, QLoRAForVisionLanguage)
    return model.train()


def randomize(model: nn.Module) -> None:
    """Give the adapters values that matter, by name, and change what is trained in full."""
    for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if "lora_B" in name or (parameter.requires_grad and "lora_A" not in name):
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.05
            copy_local_rows(parameter, values)


@pytest.fixture(scope="module")
def model(directory: Path) -> QLoRAForVisionLanguage:
    return load(directory)


def dequantized(directory: Path, model: QLoRAForVisionLanguage) -> PreTrainedModel:
    """transformers' own model, in float32, of the same dequantized weights."""
    found = model.family.model_class.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, NF4Linear):
                found.get_submodule(name.removesuffix(".base_layer")).weight.copy_(layer.dequantize())
    return found.eval()


@pytest.fixture(scope="module")
def stock(directory: Path, model: QLoRAForVisionLanguage) -> PreTrainedModel:
    return dequantized(directory, model)


@pytest.fixture(scope="module")
def peer(directory: Path, model: nn.Module, stock: PreTrainedModel, tmp_path_factory) -> PeftModel:
    """Stock transformers and peft, with what our model saved."""
    saved = tmp_path_factory.mktemp("adapter")
    save_adapter(model, saved, lora_of(directory), str(directory))
    return PeftModel.from_pretrained(copy.deepcopy(stock), saved, is_trainable=True)


def plain(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what peft calls the copies of modules that are trained in full."""
    return {name.replace(".modules_to_save.default", ""): tensor for name, tensor in found.items()}


@torch.no_grad()
def test_logits_are_those_of_transformers_and_peft(name, model, peer, stock):
    batch = batch_of(name, [2, 0, 1])
    batch.pop("labels")
    tokens = batch["attention_mask"].bool()
    expected = peer.eval()(**batch).logits[tokens]
    torch.testing.assert_close(model.eval()(**batch).logits[tokens], expected, rtol=1e-5, atol=1e-5)
    assert (expected - stock(**batch).logits[tokens]).abs().max() > 0.05, "what is trained would not matter"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3", "gemma3"], indirect=True)
@pytest.mark.filterwarnings("ignore")
def test_greedy_tokens_are_those_of_transformers_and_peft(name, model, peer):
    """Without token types, which transformers needs."""
    batch = batch_of(name, [2], length=1)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch.pop("labels")
    expected = peer.eval().generate(**batch, **options)
    batch = {key: value for key, value in batch.items() if not key.endswith("token_type_ids")}
    assert torch.equal(model.eval().generate(**batch, **options), expected)


def test_loss_and_gradients_are_those_of_transformers_and_peft(name, model, peer):
    model.checkpoint_layers(2, offload=False)
    batch = batch_of(name, [2, 0, 1])
    losses = [each.train()(**batch).loss for each in (model, peer)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    found, expected = gradients(model), plain(gradients(peer))
    assert found.keys() == expected.keys()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trained, "what has no effect is not trained"
    assert any("projector" in n or "merger" in n or "connector" in n for n in found)
    for key, gradient in found.items():
        assert (gradient - expected[key]).norm() <= 1e-4 * expected[key].norm() + 1e-7, key
    model.checkpoint_layers(0, offload=False)


def rows_alone(name: str, batch: dict[str, Tensor], counts: list[int]) -> Iterable[dict[str, Tensor]]:
    """The rows of a batch as batches of their own, without their padding."""
    first, patches = 0, 0
    for row, count in enumerate(counts):
        length = int(batch["attention_mask"][row].sum())
        alone = {key: batch[key][row : row + 1, :length] for key in ("input_ids", "labels")}
        if count and "image_grid_thw" in batch:
            grids = batch["image_grid_thw"][first : first + count]
            size = int(grids.prod(1).sum())
            alone |= {"image_grid_thw": grids, "pixel_values": batch["pixel_values"][patches : patches + size]}
            patches += size
        elif count and name in ("idefics3", "smolvlm"):
            alone |= {key: batch[key][row : row + 1, :count] for key in ("pixel_values", "pixel_attention_mask")}
        elif count:
            alone |= {key: batch[key][first : first + count] for key in ("pixel_values", "image_sizes") if key in batch}
        first += count
        yield alone


def test_a_mixed_batch_equals_its_samples_alone(name, model):
    """Alone without mask, padding and token types, which is how transformers loses the images' positions."""
    counts = [2, 0, 1]
    batch = batch_of(name, counts)
    whole = model.train()(**batch, num_items_in_batch=1).loss
    whole.backward()
    expected = gradients(model)
    alone = [model(**row, num_items_in_batch=1).loss for row in rows_alone(name, batch, counts)]
    torch.testing.assert_close(torch.stack(alone).sum(), whole, rtol=1e-5, atol=1e-5)
    torch.stack(alone).sum().backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-5)


def test_text_alone_gives_the_vision_side_zero_gradients(name, model):
    """As on another rank that has images; and no graph without gradients runs the tower."""
    batch = batch_of(name, [0, 0])
    del batch["attention_mask"]
    model.train()(**batch).loss.backward()
    found = gradients(model)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for key, gradient in found.items():
        assert bool(gradient.any()) == ("language_model" in key or "text_model" in key), key


@pytest.mark.parametrize(
    "name",
    [each if each in COMPILED else pytest.param(each, marks=pytest.mark.slow) for each in SHAPES],
    indirect=True,
)
def test_compiled_regions_give_the_same_step_without_breaks(fresh_graphs, name, directory, model):
    graphs = Graphs("eager")
    compiled = load(directory, backend=graphs)
    counts = []
    for images, length in (([2, 0, 1], 40), ([1, 3], 61)):
        batch = batch_of(name, images, length)
        if name != "gemma3":
            del batch["attention_mask"]
        losses = [each.train()(**batch).loss for each in (compiled, model)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients(compiled), gradients(model), rtol=1e-4, atol=1e-5)
        counts.append(graphs.count)
    assert counts[0] == counts[-1], counts


def test_an_adapter_of_peft_opens_here(name, directory, model, stock, tmp_path):
    config = copy.deepcopy(lora_of(directory))
    theirs = get_peft_model(copy.deepcopy(stock), config).eval()
    for number, (_key, parameter) in enumerate(sorted(theirs.named_parameters())):
        if parameter.requires_grad:
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number + 7)) * 0.1
            parameter.data.copy_(values)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(model).eval()
    load_adapter(ours, tmp_path, lora_of(directory))
    batch = batch_of(name, [1, 1])
    del batch["labels"]
    tokens = batch["attention_mask"].bool()
    with torch.no_grad():
        found, expected = (each(**batch).logits[tokens] for each in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_memory_plan_knows_the_bytes_of_the_weights(directory, model):
    settings = Settings(
        config=load_config(directory, vision=True), lora=default_lora(4), batch_size=1, seq_len=8,
        precision="32-true", head=head_of(directory), image_patches=64,
    )  # fmt: skip
    plan = plan_memory(settings)
    layers = {id(p) for p in model.decoder.layers.parameters()}
    text = {id(p) for p in [*model.decoder.parameters(), *model.lm_head.parameters()]}
    parameters = [*model.parameters()]

    def size(tensors: Iterable[Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    held = {
        "4-bit layers": size(p for p in parameters if id(p) in layers and not p.requires_grad),
        "embeddings and head": size(p for p in parameters if id(p) in text - layers),
        "adapters": size(p for p in parameters if id(p) in layers and p.requires_grad),
        "vision side": size(p for p in parameters if id(p) not in text and not p.requires_grad),
        "trained of the vision side": size(p for p in parameters if id(p) not in text and p.requires_grad),
        "statistics": size(b for m in model.modules() if isinstance(m, NF4Linear) for b in m.buffers()),
    }
    assert {part: plan.moments["step"][part] for part in held} == held
    assert plan.moments["vision"]["working memory"] > 0


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"], indirect=True)
def test_the_merged_model_is_that_of_stock_peft(name, directory, model, peer, tmp_path):
    options = VisionOptions(vision_lora=True, projector="full")
    ours = load(directory, options)
    save_adapter(ours, tmp_path / "adapter", lora_of(directory, options), str(directory))
    merged = merge_adapter(
        directory, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32, quantize_base=True,
        check_ids=torch.arange(3, 40),
    )  # fmt: skip
    assert merged.parity is not None
    stock = dequantized(directory, ours)
    theirs = PeftModel.from_pretrained(stock, tmp_path / "adapter").merge_and_unload().state_dict()
    found, report = ours.family.model_class.from_pretrained(
        merged.directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(found.state_dict(), theirs, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- loading


def older(name: str) -> str:
    """What checkpoints on the hub call a weight."""
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.")
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")


def older_qwen(name: str) -> str:
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


@pytest.mark.parametrize(("name", "rename"), [("llava", older), ("qwen2_5_vl", older_qwen)], indirect=["name"])
def test_checkpoints_with_names_of_older_versions_are_read(name, rename, directory, model, tmp_path):
    checkpoint = SafetensorsCheckpoint(directory)
    state = {rename(key): checkpoint.get(key) for key in checkpoint}
    assert state.keys() != set(checkpoint)
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load(tmp_path)
    assert dict(found.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for (key, ours), (_, theirs) in zip(found.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), key
    state.pop(min(state))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .*, which the model needs"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"], indirect=True)
def test_a_4bit_checkpoint_is_loaded_byte_for_byte_but_for_the_projector_that_is_trained(name, directory, tmp_path):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    family = VISION_FAMILIES[load_config(directory, vision=True).model_type]
    theirs = family.model_class.from_pretrained(directory, quantization_config=quantization, device_map="cpu")
    theirs.save_pretrained(tmp_path)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    options = VisionOptions(projector="full")
    model = build_model(checkpoint, lora_of(tmp_path, options), head=head_of(tmp_path, options), dtype=torch.bfloat16)
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, NF4Linear)}
    assert any("language_model" in key for key in layers)
    assert any("vis" in key for key in layers), "the checkpoint has the tower in 4 bits"
    for key, layer in layers.items():
        stored = theirs.get_submodule(key.removesuffix(".base_layer")).weight
        assert torch.equal(layer.quantized().packed, stored.data.view(torch.uint8).flatten())
        assert torch.equal(layer.quantized().absmax, stored.quant_state.absmax)
    projector = "multi_modal_projector.linear_1" if name == "llava" else "visual.merger.mlp.0"
    trained = model.model.get_submodule(projector).weight
    assert trained.requires_grad
    torch.testing.assert_close(trained.data, checkpoint.dense(f"model.{projector}.weight"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# --------------------------------------------------------------------------------------------------------------- ranks


def sharded_step(directory: Path, name: str) -> tuple[float, dict[str, Tensor]]:
    """Loss sum and full gradients, averaged over ranks, of a batch of which rank 0 has the images and rank 1 none."""
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_model(checkpoint, lora_of(directory), head=head_of(directory), checkpoint_activations=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for group in [*model.shard_groups(), [model]]:
        fully_shard(group, mesh=mesh)
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    randomize(model)
    batch = batch_of(name, [2, 1] if dist.get_rank() == 0 else [0, 0], seed=dist.get_rank())
    del batch["attention_mask"]
    loss = model.train()(**batch, num_items_in_batch=1).loss
    loss.backward()
    return loss.item(), {key: gradient.full_tensor() for key, gradient in gradients(model).items()}


@pytest.mark.parametrize("name", ["llava"], indirect=True)
def test_two_ranks_of_which_one_has_no_images_equal_one(ranks: RankPools, name, directory, model):
    expected = []
    for rank, images in enumerate(([2, 1], [0, 0])):
        batch = batch_of(name, images, seed=rank)
        del batch["attention_mask"]
        loss = model.train()(**batch, num_items_in_batch=1).loss
        (loss / 2).backward()
        expected.append(loss.item())
    mean = gradients(model)
    for rank, (loss, grads) in enumerate(ranks.run(2, "cpu", sharded_step, directory, name)):
        assert loss == pytest.approx(expected[rank], rel=1e-5)
        torch.testing.assert_close(grads, mean, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_images_that_do_not_fit_their_placeholders_are_refused(name, model):
    batch = batch_of(name, [1])
    where = (batch["input_ids"] == IMAGE).nonzero()[0]
    batch["input_ids"][tuple(where)] = 5
    with pytest.raises(ValueError, match=r"images make .* tokens, but input_ids have .* placeholders"):
        model(**batch)


@pytest.mark.parametrize("name", ["llava"], indirect=True)
def test_families_are_told_apart(tmp_path, directory, tiny_llama_dir):
    with pytest.raises(ValueError, match=r"is a language model without vision.*QLoRACausalLM.*Qwen2\.5-VL"):
        load_config(tiny_llama_dir, vision=True)
    with pytest.raises(ValueError, match=r"takes images too.*QLoRAVisionLanguage"):
        load_config(directory)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "fuyu", "architectures": ["FuyuForCausalLM"]}))
    with pytest.raises(ValueError, match=r"cannot be trained here.*Llava.*Gemma3"):
        load_config(tmp_path, vision=True)
