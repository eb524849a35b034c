"""Reading safetensors into a model: the bytes that bitsandbytes has, and a named error for every damaged checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_qlora.modules.llama import build_llama, default_lora, materialize
from lightning_qlora.modules.nf4_linear import NF4Linear, Quantized4bit
from lightning_qlora.modules.weights import INDEX_NAME, SafetensorsCheckpoint, load_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def copied(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return shutil.copytree(tiny_llama_dir, tmp_path / "copy")


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Apply ``change`` to the tensors of a checkpoint."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def split(directory: Path) -> tuple[str, str]:
    """Turn a checkpoint of one file into two shards and their index; returns the shards' names."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    first, second = shards
    return first, second


# --- 4-bit weights


def assert_same_quantization(layer: NF4Linear, theirs: bnb.nn.Linear4bit) -> None:
    ours, state = layer.quantized(), theirs.weight.quant_state
    exact = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours.packed, theirs.weight.data.reshape(-1).view(torch.uint8), **exact)
    torch.testing.assert_close(ours.absmax, state.absmax, **exact)
    assert (ours.shape, ours.blocksize, ours.quant_type) == (tuple(state.shape), state.blocksize, state.quant_type)
    assert (ours.code2 is not None) == state.nested
    if state.nested:
        torch.testing.assert_close(ours.code2, state.state2.code, **exact)
        torch.testing.assert_close(ours.absmax2, state.state2.absmax, **exact)
        torch.testing.assert_close(ours.offset, state.offset.reshape(()), **exact)


@pytest.mark.parametrize("variant", ["16-bit", "nested", "plain", "bf16-storage", "fp4", "partial", "tied", "biased"])
def test_every_form_of_checkpoint_loads_to_the_bytes_that_bitsandbytes_loads(
    variant, tiny_llama_dirs, tiny_llama_4bit_dirs, stock_4bit_llama
):
    sources = {"16-bit": tiny_llama_dirs["untied"], "biased": tiny_llama_dirs["biased"]}
    directory = sources.get(variant) or tiny_llama_4bit_dirs[variant]
    stock = stock_4bit_llama(directory)
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_llama(checkpoint, default_lora(2))
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    layers = {n.replace(".base_layer", ""): m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    peers = {n: m for n, m in stock.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert layers.keys() == peers.keys()
    assert len(layers) == (13 if variant == "partial" else 14)
    for name, peer in peers.items():
        assert_same_quantization(layers[name], peer)
        if peer.bias is not None:
            torch.testing.assert_close(layers[name].bias, peer.bias, rtol=0, atol=0)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.float32])
def test_sizes_that_fill_no_whole_words_load(tmp_path, nested, storage):
    # 3 x 40 values are 2 blocks: the quantized absmax, 2 bytes, is padded; what follows it in the file is unaligned.
    weight = torch.randn(3, 40)
    packed, state = bnb.functional.quantize_4bit(weight, compress_statistics=nested, quant_type="nf4")
    tensors = {"layer.weight": packed.view(-1).view(storage).unsqueeze(1), "a.odd": torch.zeros(3, dtype=torch.uint8)}
    tensors |= {f"layer.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = nn.ModuleDict({"layer": NF4Linear(40, 3, nested=nested)})
    load_weights(model, SafetensorsCheckpoint(tmp_path))
    expected = NF4Linear.from_quantized(Quantized4bit.from_quant_state(packed, state))
    torch.testing.assert_close(model["layer"].dequantize(), expected.dequantize(), rtol=0, atol=0)


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> tuple[SafetensorsCheckpoint, Tensor]:
    """One column of 64 bytes, saved in four dtypes."""
    directory = tmp_path_factory.mktemp("columns")
    expected = torch.arange(64, dtype=torch.uint8).unsqueeze(1)
    dtypes = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
    save_file({str(d): expected.view(-1).view(d).unsqueeze(1).clone() for d in dtypes}, directory / "m.safetensors")
    return SafetensorsCheckpoint(directory), expected.view(-1)


@settings(max_examples=40, deadline=None)
@given(dtype=st.sampled_from(["uint8", "bfloat16", "float16", "float32"]), a=st.integers(0, 64), b=st.integers(0, 64))
def test_any_range_of_bytes_reads_as_a_slice(columns, dtype, a, b):
    checkpoint, expected = columns
    start, stop = min(a, b), max(a, b)
    assert torch.equal(checkpoint.bytes(f"torch.{dtype}", start, stop), expected[start:stop])


def test_a_quantization_of_another_shape_than_the_model_is_refused(tiny_llama_4bit_dir):
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"down_proj": NF4Linear(160, 32)})})])
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.down_proj.weight' has shape \[64, 160\].*\(32, 160\)"):
        load_weights(model, SafetensorsCheckpoint(tiny_llama_4bit_dir))


# --- other weights


def test_parameters_take_their_own_dtype_and_adapters_are_left_alone(tmp_path):
    save_file({"up.weight": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    model = nn.Module()
    model.up = nn.Module()
    model.up.base_layer = nn.Linear(2, 1, bias=False)
    model.up.lora_A = nn.Linear(2, 1, bias=False)
    adapter = model.up.lora_A.weight.clone()
    load_weights(model, SafetensorsCheckpoint(tmp_path))
    assert model.up.base_layer.weight.dtype == torch.float32
    assert model.up.base_layer.weight.tolist() == [[1.5, -2.0]]
    assert torch.equal(model.up.lora_A.weight, adapter)


def test_two_shards_read_as_one_file(copied, tiny_llama_dir):
    split(copied)
    whole, sharded = SafetensorsCheckpoint(tiny_llama_dir), SafetensorsCheckpoint(copied)
    assert sorted(whole) == sorted(sharded)
    assert all(torch.equal(whole.get(name), sharded.get(name)) for name in whole)
    assert whole.shape("model.norm.weight") == sharded.shape("model.norm.weight") == (64,)


def test_adapters_beside_a_model_are_no_part_of_it(copied):
    save_file({"lora": torch.zeros(1)}, copied / "adapter_model.safetensors")
    assert "lora" not in SafetensorsCheckpoint(copied)


# --- damage


def missing_shard(directory: Path) -> None:
    (directory / split(directory)[1]).unlink()


def index_of_a_tensor_that_is_nowhere(directory: Path) -> None:
    split(directory)
    index = json.loads((directory / INDEX_NAME).read_text())
    index["weight_map"]["model.extra.weight"] = "model-1-of-2.safetensors"
    (directory / INDEX_NAME).write_text(json.dumps(index))


def write_index(text: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / INDEX_NAME).write_text(text)


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def weights_as_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_shard, r"lacks model-2-of-2.safetensors, which model.safetensors.index.json names"),
        (index_of_a_tensor_that_is_nowhere, "names 'model.extra.weight', but no shard holds it"),
        (write_index("{"), "index.json is damaged .*Download it again"),
        (write_index("{}"), "index.json is damaged .*Download it again"),
        (write_index("[1]"), "index.json is damaged .*Download it again"),
        (write_index('{"weight_map": ["a"]}'), "index.json is damaged .*Download it again"),
        (write_index('{"weight_map": {}}'), r"holds no \*.safetensors weights"),
        (truncate, r"model.safetensors is damaged or not a safetensors file .*Download it again"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
        (lambda d: (d / "model.safetensors").write_text("version https://git-lfs"), "model.safetensors is damaged"),
        (lambda d: (d / "model.safetensors").unlink(), r"holds no \*.safetensors weights"),
        (weights_as_pickle, r"holds no \*.safetensors weights. Checkpoints in another format can be converted"),
    ],
)
def test_damage_is_found_when_the_checkpoint_is_opened(copied, damage, message):
    damage(copied)
    with pytest.raises(ValueError, match=message) as error:
        SafetensorsCheckpoint(copied)
    assert str(copied) in str(error.value)


def test_a_directory_that_does_not_exist_holds_no_weights(tmp_path):
    with pytest.raises(ValueError, match="no-such holds no"):
        SafetensorsCheckpoint(tmp_path / "no-such")


def test_an_unknown_tensor_is_named(tiny_llama_dir):
    checkpoint = SafetensorsCheckpoint(tiny_llama_dir)
    for read in (checkpoint.get, checkpoint.shape):
        with pytest.raises(ValueError, match=r"has no tensor 'x': the checkpoint does not fit its config.json"):
            read("x")


# --- fingerprints


def test_a_fingerprint_is_the_models_own(tiny_llama_dirs, tiny_llama_4bit_dirs, copied):
    directories = [*tiny_llama_dirs.values(), *tiny_llama_4bit_dirs.values()]
    fingerprints = {SafetensorsCheckpoint(directory).fingerprint() for directory in directories}
    assert len(fingerprints) == len(directories)
    assert SafetensorsCheckpoint(copied).fingerprint() == SafetensorsCheckpoint(tiny_llama_dirs["untied"]).fingerprint()
    assert all(len(fingerprint) == 16 and int(fingerprint, 16) >= 0 for fingerprint in fingerprints)


def test_a_changed_weight_changes_the_fingerprint(copied):
    before = SafetensorsCheckpoint(copied).fingerprint()
    rewrite(copied, lambda tensors: tensors["model.norm.weight"][5:6].add_(0.5))
    assert SafetensorsCheckpoint(copied).fingerprint() != before
