"""Random checkpoints have the sizes they are named after, and stock libraries read them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

from lightning_qlora.modules.checkpoints import random_weights
from lightning_qlora.modules.checkpoints.random_weights import SHAPES, checkpoint_of, write_random_checkpoint
from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.models.build import build_model, materialize
from lightning_qlora.modules.quantization.nf4_linear import NF4Linear


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds tiny-4bit and tiny-bf16."""
    directory = tmp_path_factory.mktemp("checkpoints")
    for name, quantized in (("tiny-4bit", True), ("tiny-bf16", False)):
        write_random_checkpoint(directory / name, SHAPES["tiny"], quantized=quantized)
    return directory


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as on the models' cards
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen2.5-32b", 32_763_876_352),
        ("qwen3-8b", 8_190_735_360),
        ("gemma2-2b", 2_614_341_888),
    ],
)
def test_named_shapes_have_the_size_of_their_models(name, parameters):
    assert SHAPES[name].structure().num_parameters() == parameters


def test_a_4bit_checkpoint_is_what_bitsandbytes_reads(checkpoints, stock_4bit_llama):
    directory = checkpoints / "tiny-4bit"
    stock = stock_4bit_llama(directory)
    model = build_model(SafetensorsCheckpoint(directory), default_lora(2))
    materialize(model, SafetensorsCheckpoint(directory), torch.device("cpu"), seed=0)
    ours = {n.replace(".base_layer", ""): m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    theirs = {n: m for n, m in stock.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert ours.keys() == theirs.keys()
    assert len(ours) == 14
    for name, layer in theirs.items():
        state = layer.weight.quant_state
        expected = bnb.functional.dequantize_4bit(layer.weight.data, state)
        torch.testing.assert_close(ours[name].dequantize(torch.bfloat16), expected, rtol=0, atol=0)
        scale = ours[name].dequantize().std() * layer.in_features**0.5
        assert 0.9 < scale < 1.1


@pytest.mark.parametrize("name", ["tiny-4bit", "tiny-bf16"])
def test_activations_keep_their_size_and_losses_are_near_chance(checkpoints, name):
    checkpoint = SafetensorsCheckpoint(checkpoints / name)
    model = build_model(checkpoint, default_lora(2))
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    ids = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    assert math.log(300) < loss < math.log(300) + 1


def test_seeds_tell_checkpoints_apart(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_random_checkpoint(tmp_path / name, SHAPES["tiny"], seed=seed)
    a, b, c = (load_file(tmp_path / name / "model-00001-of-00003.safetensors") for name in "abc")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], c[name])


def test_an_existing_directory_is_left_alone(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists already"):
        write_random_checkpoint(tmp_path / "there", SHAPES["tiny"])


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    written = []

    def save(tensors: dict[str, torch.Tensor], path: Path, **_: Any) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError("disk full")

    monkeypatch.setattr(random_weights, "save_file", save)
    with pytest.raises(OSError, match="disk full"):
        write_random_checkpoint(tmp_path / "model", SHAPES["tiny"])
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_other_sizes_is_refused(tmp_path):
    write_random_checkpoint(tmp_path / "llama-3.2-1b-4bit", SHAPES["tiny"])
    with pytest.raises(
        ValueError, match=r"holds a model of other sizes than Shape\(model_type='llama', sizes={'num_hidden_layers': 16"
    ):
        checkpoint_of("llama-3.2-1b", tmp_path, True)
