"""Reading safetensors into a model: the bytes that bitsandbytes has, and a named error for every damaged checkpoint."""

import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_qlora.kernels import Quantized4bit
from lightning_qlora.modules.checkpoints.loading import CHUNK_BYTES, check_weights, load_weights
from lightning_qlora.modules.checkpoints.resolve import resolve_model
from lightning_qlora.modules.checkpoints.safetensors_files import INDEX_NAME, SafetensorsCheckpoint
from lightning_qlora.modules.lora.config import default_lora, is_adapter
from lightning_qlora.modules.models.build import build_model, materialize
from lightning_qlora.modules.models.families import load_config
from lightning_qlora.modules.quantization.nf4_linear import NF4Linear
from tests.distributed import groups

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
    model = build_model(checkpoint, default_lora(2))
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
    tensors = {
        "layer.weight": packed.view(-1).view(storage).unsqueeze(1),
        "a.rotary_emb.inv_freq": torch.zeros(3, dtype=torch.uint8),
    }
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


@pytest.mark.parametrize("part", ["", ".absmax", ".nested_absmax", ".nested_quant_map"])
def test_a_quantization_cut_short_is_named_before_the_model_has_any_memory(tiny_llama_4bit_dir, tmp_path, part):
    directory = shutil.copytree(tiny_llama_4bit_dir, tmp_path / "copy")
    name = f"model.layers.1.mlp.up_proj.weight{part}"
    rewrite(directory, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_model(checkpoint, default_lora(2))
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(ValueError, match=rf"'{name}' has size in bytes \d+, but config.json implies \d+"):
        check_weights(model, checkpoint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is damaged .*Download it again"),
        (b"[]", "is damaged .*Download it again"),
        (b"\xff", "is damaged .*Download it again"),
        (b'{"shape": [160, 64], "quant_type": "nf4"}', r"lacks \['blocksize', 'nested_offset'\]"),
    ],
)
def test_a_damaged_description_of_a_quantization_is_named(tiny_llama_4bit_dir, tmp_path, text, message):
    directory = shutil.copytree(tiny_llama_4bit_dir, tmp_path / "copy")
    name = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    rewrite(directory, lambda tensors: tensors.update({name: torch.tensor(list(text), dtype=torch.uint8)}))
    with pytest.raises(ValueError, match=f"'{name}' {message}"):
        build_model(SafetensorsCheckpoint(directory), default_lora(2))


@pytest.mark.parametrize("variant", ["untied", "tied", "biased"])
def test_a_model_that_fits_passes_the_check_on_the_meta_device(variant, tiny_llama_dirs, tiny_llama_4bit_dirs):
    for directory in (tiny_llama_dirs[variant], tiny_llama_4bit_dirs.get(variant)):
        if directory is not None:
            checkpoint = SafetensorsCheckpoint(directory)
            check_weights(build_model(checkpoint, default_lora(2)), checkpoint, skip=is_adapter)


def test_a_quantization_of_another_shape_than_the_model_is_refused(tiny_llama_4bit_dir):
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"down_proj": NF4Linear(160, 32)})})])
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.down_proj.weight' has shape \(64, 160\).*\(32, 160\)"):
        load_weights(model, SafetensorsCheckpoint(tiny_llama_4bit_dir))


# --- other weights


def test_parameters_take_their_own_dtype_and_adapters_are_left_alone(tmp_path):
    save_file({"up.weight": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    model = nn.Module()
    model.up = nn.Module()
    model.up.base_layer = nn.Linear(2, 1, bias=False)
    model.up.lora_A = nn.Linear(2, 1, bias=False)
    adapter = model.up.lora_A.weight.clone()
    load_weights(model, SafetensorsCheckpoint(tmp_path), skip=is_adapter)
    assert model.up.base_layer.weight.dtype == torch.float32
    assert model.up.base_layer.weight.tolist() == [[1.5, -2.0]]
    assert torch.equal(model.up.lora_A.weight, adapter)


@settings(max_examples=30, deadline=None)
@given(a=st.integers(0, 300), b=st.integers(0, 300))
def test_any_range_of_rows_reads_as_a_slice(tiny_llama_dir, a, b):
    checkpoint = SafetensorsCheckpoint(tiny_llama_dir)
    name, start, stop = "model.embed_tokens.weight", min(a, b), max(a, b)
    whole = load_file(tiny_llama_dir / "model.safetensors")[name]
    before = checkpoint.bytes_read
    assert torch.equal(checkpoint.rows(name, start, stop), whole[start:stop])
    assert checkpoint.bytes_read - before == whole[start:stop].nbytes


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.float64])
def test_dtypes_beside_those_of_weights_read_too(tmp_path, dtype):
    tensors = {"a": torch.eye(2).to(dtype), "scalar": torch.tensor(1).to(dtype), "none": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    for name, expected in tensors.items():
        torch.testing.assert_close(checkpoint.get(name), expected, rtol=0, atol=0)


def test_what_is_read_may_be_written_to(copied):
    checkpoint = SafetensorsCheckpoint(copied)
    checkpoint.get("model.norm.weight").zero_()
    assert checkpoint.get("model.norm.weight").all()


def test_two_shards_read_as_one_file(copied, tiny_llama_dir):
    split(copied)
    whole, sharded = SafetensorsCheckpoint(tiny_llama_dir), SafetensorsCheckpoint(copied)
    assert sorted(whole) == sorted(sharded)
    assert all(torch.equal(whole.get(name), sharded.get(name)) for name in whole)
    assert whole.shape("model.norm.weight") == sharded.shape("model.norm.weight") == (64,)


def test_adapters_beside_a_model_are_no_part_of_it(copied):
    save_file({"lora": torch.zeros(1)}, copied / "adapter_model.safetensors")
    assert "lora" not in SafetensorsCheckpoint(copied)


# --- every tensor is accounted for


def without(*ends: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(ends)]


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_biases(directory: Path) -> None:
    """Biases without their mark in config.json, as an older transformers wrote them."""
    names = [f"model.layers.{i}.self_attn.{p}_proj.bias" for i in range(2) for p in "qkvo"]
    rewrite(directory, lambda tensors: tensors.update({name: torch.ones(64) for name in names}))


def tie_config_only(directory: Path) -> None:
    configure(directory, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: rewrite(d, without("1.mlp.up_proj.weight")), "lacks 'model.layers.1.mlp.up_proj.weight', which"),
        (lambda d: rewrite(d, without("proj.weight", "norm.weight")), "lacks 19 tensors ('model.layers.0.input_lay"),
        (
            add_biases,
            "0.self_attn.q_proj.bias', ...), which the model does not take. Those are biases: set attention_b",
        ),
        (lambda d: configure(d, num_hidden_layers=1), "holds 9 tensors ('model.layers.1.input_layernorm.weight', "),
        (lambda d: configure(d, num_hidden_layers=3), "lacks 9 tensors ('model.layers.2.input_layernorm.weight', "),
        (lambda d: rewrite(d, lambda t: t.update(x=torch.ones(1))), "holds 'x', which the model does not take. config"),
        (tie_config_only, "holds 'lm_head.weight', which is not 'model.embed_tokens.weight' although config.json ties"),
    ],
)
def test_what_is_missing_or_left_over_is_named_before_the_model_has_any_memory(copied, change, message):
    change(copied)
    checkpoint = SafetensorsCheckpoint(copied)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        materialize(build_model(checkpoint, default_lora(2)), checkpoint, torch.device("cpu"), seed=0)
    assert str(copied) in str(error.value)


def test_parts_of_a_4_bit_tensor_belong_to_it_and_to_nothing_else(tiny_llama_4bit_dir, tmp_path):
    directory = shutil.copytree(tiny_llama_4bit_dir, tmp_path / "copy")
    rewrite(directory, lambda t: t.update({"model.layers.0.mlp.up_proj.weight.more": torch.ones(1)}))
    checkpoint = SafetensorsCheckpoint(directory)
    with pytest.raises(ValueError, match=r"holds 'model\.layers\.0\.mlp\.up_proj\.weight\.more', which"):
        check_weights(build_model(checkpoint, default_lora(2)), checkpoint, skip=is_adapter)


def test_what_is_computed_anyway_may_be_there(tiny_llama_dirs, tmp_path):
    """Rotary frequencies in each layer and a copy of the embedding for the head, as older versions saved them."""
    directory = shutil.copytree(tiny_llama_dirs["tied"], tmp_path / "copy")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(directory, change)
    checkpoint = SafetensorsCheckpoint(directory)
    materialize(build_model(checkpoint, default_lora(2)), checkpoint, torch.device("cpu"), seed=0)


def compiled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}


def compiled_by_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"(layers\.\d+)", r"\1._orig_mod", name): tensor for name, tensor in tensors.items()}


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("prefixes", [compiled, compiled_by_layer, bare])
@pytest.mark.parametrize("form", ["16-bit", "4-bit"])
def test_prefixes_of_compiled_models_and_of_bare_decoders_are_understood(
    prefixes, form, tiny_llama_dir, tiny_llama_4bit_dir, tmp_path
):
    source = tiny_llama_dir if form == "16-bit" else tiny_llama_4bit_dir
    directory = shutil.copytree(source, tmp_path / "copy")
    save_file(prefixes(load_file(source / "model.safetensors")), directory / "model.safetensors")
    models = []
    for each in (source, directory):
        checkpoint = SafetensorsCheckpoint(each)
        models.append(build_model(checkpoint, default_lora(2)))
        materialize(models[-1], checkpoint, torch.device("cpu"), seed=0)
    for (name, expected), (_, found) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert torch.equal(expected.data.view(torch.uint8), found.data.view(torch.uint8)), name


def test_tensors_under_two_names_are_refused(copied):
    rewrite(copied, lambda tensors: tensors.update({"_orig_mod.model.norm.weight": torch.ones(64)}))
    with pytest.raises(ValueError, match=r"holds tensors twice, with and without '_orig_mod\.'"):
        SafetensorsCheckpoint(copied)


def test_a_4_bit_head_is_dequantized(tiny_llama_dir, tmp_path):
    directory, name = shutil.copytree(tiny_llama_dir, tmp_path / "copy"), "lm_head.weight"
    head = load_file(tiny_llama_dir / "model.safetensors")[name]
    packed, state = bnb.functional.quantize_4bit(head.float(), compress_statistics=True, quant_type="nf4")
    parts = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    rewrite(directory, lambda tensors: tensors.update({name: packed, **parts}))
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_model(checkpoint, default_lora(2))
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    expected = bnb.functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(model.lm_head.weight.float(), expected, rtol=0, atol=0)
    assert 0.01 < (expected - head.float()).abs().max() < 0.1  # the rounding of 4 bits, and no more
    assert torch.equal(checkpoint.dense(name), expected)


# --- quantizations that are not read here


def int8(tensors: dict[str, Tensor]) -> None:
    """As bitsandbytes' LLM.int8 stores a weight: codes, and the largest value of each row."""
    for name in [name for name in tensors if "_proj" in name]:
        largest = tensors[name].float().abs().amax(1)
        tensors[name] = (tensors[name].float() * 127 / largest[:, None]).round().to(torch.int8)
        tensors[name.replace(".weight", ".SCB")] = largest


def scaled(dtype: torch.dtype, scale: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors |= {name: tensors[name].to(dtype), name.removesuffix("weight") + scale: torch.ones(160, 1)}

    return change


def other_table(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight.quant_map"] += 0.01


@pytest.mark.parametrize(
    ("change", "scheme"),
    [
        (int8, r"quantized by bitsandbytes in 8 bits \(LLM\.int8\)"),
        (scaled(torch.int8, "weight_scale"), "quantized by compressed-tensors or FP8"),
        (scaled(torch.float8_e4m3fn, "weight_scale_inv"), "quantized by FP8"),
        (scaled(torch.int32, "unknown"), "quantized by something that stores them as I32"),
        (scaled(torch.uint8, "unknown"), "quantized by something that stores them as U8"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.ones(2, 2)}), "quantized by GPTQ or AWQ"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.W_q": torch.ones(2, 2)}), "quantized by HQQ"),
    ],
)
def test_codes_of_other_quantizations_are_never_taken_for_weights(copied, change, scheme):
    """Without a word of it in config.json: what is stored tells."""
    rewrite(copied, change)
    for opened in (SafetensorsCheckpoint, resolve_model):
        with pytest.raises(
            ValueError, match=rf"copy holds weights {scheme} .*the unquantized model, or its bitsandbytes"
        ):
            opened(copied)


def test_another_table_of_4_bit_values_is_refused(tiny_llama_4bit_dir, tmp_path):
    directory = shutil.copytree(tiny_llama_4bit_dir, tmp_path / "copy")
    rewrite(directory, other_table)
    with pytest.raises(
        ValueError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight\.quant_map' is not the table of nf4"
    ):
        SafetensorsCheckpoint(directory)


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"bitsandbytes in 8 bits \(LLM\.int8\)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": True}, "bitsandbytes in 8 bits.*"),
        *[({"quant_method": name, "bits": 4}, name) for name in ("gptq", "awq", "hqq", "fp8", "compressed-tensors")],
        ({"bits": 4, "group_size": 64}, "an unnamed method"),
    ],
)
def test_every_quantization_but_bitsandbytes_4_bit_is_refused_by_name(copied, quantization, name):
    keys = ["quantization_config"] if "quant_method" in quantization else ["quantization_config", "quantization"]
    for key in keys:
        configure(copied, **{"quantization_config": None, key: quantization})
        for read in (load_config, resolve_model):
            with pytest.raises(ValueError, match=rf"copy is quantized by {name}, as its config\.json says.*bnb-4bit"):
                read(copied)


def test_older_and_newer_descriptions_of_bitsandbytes_4_bit_are_known(copied, tiny_llama_4bit_dir):
    assert load_config(tiny_llama_4bit_dir).model_type == "llama"
    for quantization in ({"load_in_4bit": True}, {"_load_in_4bit": True, "quant_method": "bitsandbytes"}, None):
        configure(copied, quantization_config=quantization)
        assert resolve_model(copied) == copied


# --- which files


def test_a_whole_file_is_the_model_whatever_lies_beside_it(copied):
    """Mistral's repositories hold the weights under other names, too."""
    save_file({"layers.0.attention.wq.weight": torch.ones(1)}, copied / "consolidated.safetensors")
    assert "layers.0.attention.wq.weight" not in SafetensorsCheckpoint(copied)


def test_two_models_in_one_directory_are_refused(copied):
    whole = (copied / "model.safetensors").read_bytes()
    split(copied)
    (copied / "model.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match=r"holds two models: model\.safetensors, and the shards that .*Remove one"):
        SafetensorsCheckpoint(copied)


# --- memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_a_few_chunks_beside_the_model_and_no_mapped_pages(tmp_path):
    rows = 8 * CHUNK_BYTES // 1024
    save_file({"weight": torch.ones(rows, 512, dtype=torch.float16)}, tmp_path / "model.safetensors")
    model = nn.Embedding(rows, 512)  # float32
    with torch.no_grad():
        model.weight.zero_()
    checkpoint = SafetensorsCheckpoint(tmp_path)
    peak, done = resident_bytes(), threading.Event()
    start = peak

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, resident_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        report = load_weights(model, checkpoint)
    finally:
        done.set()
        thread.join()
    assert model.weight.min() == 1
    assert report.bytes_read == 8 * CHUNK_BYTES
    assert report.seconds > 0
    # One chunk as stored (float16), one converted (twice that), and what malloc keeps of them and of earlier tests.
    assert max(peak, resident_bytes()) - start < 5.5 * CHUNK_BYTES


def load_sharded(directory: Path, device: str) -> tuple[int, dict[str, Tensor]]:
    """Bytes that this rank read, and the full tensors of all parameters."""
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_model(checkpoint, default_lora(2))
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for group in model.shard_groups():
        fully_shard(group, mesh=mesh)
    fully_shard(model, mesh=mesh)
    materialize(model, checkpoint, torch.device(device), seed=0)
    return checkpoint.bytes_read, {name: p.full_tensor().cpu() for name, p in model.named_parameters()}


@pytest.mark.parametrize("variant", ["aligned", "nested", "plain", "tied"])
@pytest.mark.parametrize(("world_size", "device"), [(3, "cpu"), groups(2)[1]])
def test_each_rank_reads_its_own_rows_and_together_they_hold_the_model(
    ranks, world_size, device, variant, tiny_llama_4bit_dirs
):
    directory = tiny_llama_4bit_dirs[variant]
    checkpoint = SafetensorsCheckpoint(directory)
    expected = build_model(checkpoint, default_lora(2))
    materialize(expected, checkpoint, torch.device("cpu"), seed=0)
    results = ranks.run(world_size, device, load_sharded, directory, device)
    for _, tensors in results:
        for name, parameter in expected.named_parameters():
            # As bytes: viewed as float32, packed nibbles may be NaN.
            assert torch.equal(tensors[name].view(torch.uint8), parameter.data.view(torch.uint8)), name
    replicated = sum(checkpoint.nbytes(name) for name in checkpoint if "nested" in name or "quant_state" in name)
    sharded = sum(p.nbytes for n, p in expected.named_parameters() if "lora" not in n)
    for read, _ in results:
        # quant_state is read by the builder, by the check and by the load; rows may not divide evenly.
        assert read < 1.1 * sharded / world_size + 3 * replicated


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


def index_of_a_tensor_in_another_shard(directory: Path) -> None:
    _, second = split(directory)
    index = json.loads((directory / INDEX_NAME).read_text())
    assert index["weight_map"]["model.norm.weight"] != second
    index["weight_map"]["model.norm.weight"] = second
    (directory / INDEX_NAME).write_text(json.dumps(index))


def change_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        file = directory / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def overlap(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"] = header["lm_head.weight"]["data_offsets"]


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def weights_as_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_shard, r"lacks model-2-of-2.safetensors, which model.safetensors.index.json names"),
        (index_of_a_tensor_that_is_nowhere, "1-of-2.safetensors does not hold 'model.extra.weight', as .*index.json"),
        (index_of_a_tensor_in_another_shard, "2-of-2.safetensors does not hold 'model.norm.weight', as .*index.json"),
        (write_index("{"), "index.json is damaged .*Download it again"),
        (write_index("{}"), "index.json is damaged .*Download it again"),
        (write_index("[1]"), "index.json is damaged .*Download it again"),
        (write_index('{"weight_map": ["a"]}'), "index.json is damaged .*Download it again"),
        (write_index('{"weight_map": {}}'), r"holds no \*.safetensors weights"),
        (change_header(lambda h: h["model.norm.weight"].update(shape=[65])), "model.safetensors is damaged"),
        (change_header(lambda h: h["model.norm.weight"].update(dtype="F7")), "model.safetensors is damaged"),
        (change_header(lambda h: h["model.norm.weight"].pop("data_offsets")), "model.safetensors is damaged"),
        (change_header(overlap), "model.safetensors is damaged"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x01" * 99), "model.safetensors is damaged"),
        (truncate, r"model.safetensors is damaged or not a safetensors file .*Download it again"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
        (lambda d: (d / "model.safetensors").write_text("version https://git-lfs"), "model.safetensors is damaged"),
        (lambda d: (d / "model.safetensors").unlink(), r"holds no \*.safetensors weights"),
        (
            weights_as_pickle,
            r"holds no \*.safetensors weights. Weights in another format .pytorch_model.bin. are converted once",
        ),
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


def test_a_file_that_shrinks_while_it_is_open_is_named(copied):
    checkpoint = SafetensorsCheckpoint(copied)
    os.truncate(copied / "model.safetensors", 1000)
    with pytest.raises(ValueError, match=r"model.safetensors has become shorter: 'model.norm.weight' cannot be read"):
        checkpoint.get("model.norm.weight")


def test_a_dtype_that_no_model_here_has_is_named(tmp_path):
    save_file({"x": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="'x' is stored as F8_E4M3; supported are BOOL, U8"):
        SafetensorsCheckpoint(tmp_path).get("x")


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


def test_a_finetune_that_kept_the_embedding_has_another_fingerprint(tmp_path):
    fingerprints = set()
    for value in (0, 1):
        save_file({"a": torch.zeros(2**20), "b": torch.full((3000,), float(value))}, tmp_path / "model.safetensors")
        fingerprints.add(SafetensorsCheckpoint(tmp_path).fingerprint())
    assert len(fingerprints) == 2


def test_a_default_device_does_not_matter(tiny_llama_4bit_dir):
    """Some of Lightning's strategies build models with the GPU as the default; "meta" stands for it here."""
    states = []
    for default in ("cpu", "meta"):
        checkpoint = SafetensorsCheckpoint(tiny_llama_4bit_dir)
        model = build_model(checkpoint, default_lora(4))
        with torch.device(default):
            materialize(model, checkpoint, torch.device("cpu"), seed=0)
        tensors = {**model.state_dict(), "inv_freq": model.model.rotary_emb.inv_freq}
        states.append({name: tensor.numpy().tobytes() for name, tensor in tensors.items()})
    assert states[0] == states[1]
