"""Exported GGUF files compute in a real llama.cpp what transformers computes; what it would not compute is refused."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig

from lightning_qlora.modules.checkpoints.tokenizer import load_tokenizer
from lightning_qlora.modules.export import gguf
from lightning_qlora.modules.export.gguf import export_gguf, export_gguf_adapter
from lightning_qlora.modules.export.llama_cpp import verify_gguf
from lightning_qlora.modules.export.llama_cpp_process import LlamaCpp
from lightning_qlora.modules.export.weights import FinetunedWeights
from lightning_qlora.modules.hardware import peak_mib
from lightning_qlora.modules.models.families import FAMILIES
from tests.modules.export.gguf_models import VOCAB_SIZE, export, save_adapter, value

pytest.importorskip("xllamacpp", reason="needs the extra llama.cpp")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_answers_in_llama_cpp_as_in_transformers(model_type, model):
    _, verified = export(model(model_type))
    assert verified.positions >= 64
    assert verified.difference < 0.02
    assert verified.top1 == 1


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 256,
            "short_factor": [1 + i / 10 for i in range(8)], "long_factor": [2 + i / 5 for i in range(8)]}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [
        ("qwen2", {"rope_type": "linear", "factor": 4.0}),
        ("granite", LLAMA3),
        ("smollm3", YARN),
        ("qwen3", {**YARN, "attention_factor": 1.5}),
        ("llama", LONGROPE),
    ],
    ids=lambda value: value if isinstance(value, str) else value["rope_type"],
)
def test_rope_scaling(model_type, rope, model):
    options: dict[str, Any] = {"max_position_embeddings": 512, **({"head_dim": 16} if model_type == "qwen3" else {})}
    _, verified = export(model(model_type, rope_parameters={"rope_theta": 10000.0, **rope}, **options))
    assert verified.difference < 0.02


def test_longrope_beyond_the_original_context(model):
    rope = {"rope_theta": 10000.0, **LONGROPE, "original_max_position_embeddings": 32}
    weights = FinetunedWeights(model("phi3", original_max_position_embeddings=32, rope_parameters=rope))
    exported = export_gguf(weights, weights.checkpoint.directory / "m.gguf")
    row = torch.randint(5, 300, (60,), generator=torch.Generator().manual_seed(0))
    with LlamaCpp(exported.path, context=128) as llama:
        ids, log_probs = llama.log_probs(row.tolist(), VOCAB_SIZE)
    expected = weights.logits(row)[-1].log_softmax(-1)[ids]
    assert float((log_probs - expected).abs().max()) < 0.02


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("qwen2", {"rope_parameters": {"rope_theta": 1e4, **LLAMA3}}, "by 'llama3'; llama.cpp's 'qwen2' knows linear"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, **YARN, "beta_fast": 16}}, "has {'beta_fast': 16}"),
        ("llama", {"hidden_act": "gelu"}, "activation is 'gelu'; llama.cpp's 'llama' computes 'silu'"),
        ("smollm3", {"no_rope_layer_interval": 2}, "rotary embeddings in the layers"),
        ("gemma2", {"query_pre_attn_scalar": 20}, "query_pre_attn_scalar=20; llama.cpp's 'gemma2' by that of 32"),
        ("gemma2", {"tie_word_embeddings": False}, "always uses the embeddings as head"),
        ("gemma2", {"attn_logit_softcapping": None}, "always caps"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "always has windows"),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"] * 3 + ["full_attention"]}, "each 6th"),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_compute_is_refused(model_type, options, message, model):
    directory = model(model_type, **options)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        export_gguf(FinetunedWeights(directory), directory / "m.gguf")
    assert not [path for path in directory.iterdir() if "gguf" in path.name]


def test_windows_that_llama_cpp_lacks_limit_the_context(model):
    exported, _ = export(model("mistral", sliding_window=100))
    assert len(exported.notes) == 1
    assert (
        "no attention windows, and this model's are 100 tokens: the context length is set to 100" in exported.notes[0]
    )
    assert value(exported.path, "llama.context_length") == 100


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma2"])
def test_an_adapter_is_merged_and_alone_it_does_the_same(model_type, model):
    directory = model(model_type)
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(FAMILIES[model_type].projections), use_rslora=True,
        rank_pattern={"o_proj": 2}, alpha_pattern={"down_proj": 3}, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapter = save_adapter(directory, lora)
    exported, merged = export(directory, adapter=adapter)
    assert exported.adapted == 2 * len(FAMILIES[model_type].projections)
    assert merged.difference < 0.02
    base = export_gguf(FinetunedWeights(directory), directory / "base.gguf").path
    alone = export_gguf_adapter(directory, adapter, directory / "adapter.gguf", base_gguf=base)
    assert alone.verified is not None
    assert alone.verified.difference < 0.02
    assert alone.total_bytes < base.stat().st_size / 4
    # The adapter matters: without it the same comparison fails.
    with pytest.raises(ValueError, match=r"In llama\.cpp"):
        verify_gguf(base, FinetunedWeights(directory, adapter), load_tokenizer(directory), "f16")


def test_a_4_bit_base_is_exported_dequantized(tiny_llama_4bit_dir):
    weights = FinetunedWeights(tiny_llama_4bit_dir)
    assert weights.is_4bit
    path = tiny_llama_4bit_dir.parent / "4bit.gguf"
    assert export_gguf(weights, path, verify=True).verified.difference < 0.02


def test_quantized_adapters_are_refused(model):
    with pytest.raises(ValueError, match="write them as f32, f16 or bf16, not as q8_0"):
        export_gguf_adapter(model("llama"), "adapter", "a.gguf", file_type="q8_0")


# ---------------------------------------------------------------------------------------------------- files and memory


def test_what_fails_leaves_nothing(model, monkeypatch):
    directory = model("qwen2")
    weights, before = FinetunedWeights(directory), {*directory.iterdir()}
    output = directory / "m.gguf"

    def interrupt(done: int, total: int) -> None:
        assert total > done > total / 2 or done < total / 2
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(weights, output, progress=interrupt)
    assert {*directory.iterdir()} == before
    usage = shutil.disk_usage(directory)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=64 * 2**20))
        with pytest.raises(ValueError, match=r"needs 0\.00 GiB, but .* has 0\.06 GiB free"):
            export_gguf(weights, output)
    assert {*directory.iterdir()} == before
    output.write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        export_gguf(weights, output)
    assert output.read_text() == "mine"


def test_a_file_that_llama_cpp_answers_wrongly_from_is_not_kept(model, monkeypatch):
    directory = model("llama")
    before = {*directory.iterdir()}
    # q and k as transformers has them, whose rotary pairs are half a head apart.
    monkeypatch.setattr(gguf, "transformed", lambda architecture, config, name, weight: weight.float())
    with pytest.raises(ValueError, match="A tensor, the rotary embedding or another number of the file is wrong"):
        export_gguf(FinetunedWeights(directory), directory / "m.gguf", verify=True)
    assert {*directory.iterdir()} == before


def test_memory_holds_a_tensor_as_it_is_read_and_as_it_is_written(model):
    directory = model("qwen2", hidden_size=512, intermediate_size=8192, num_hidden_layers=3)
    weights = FinetunedWeights(directory)
    tensor = 512 * 8192 * 2 / 2**20
    assert sum(2 * np.prod(shape) for shape in weights.shapes.values()) / 2**20 > 9 * tensor
    export_gguf(weights, directory / "first.gguf")  # what is imported and allocated once
    for file_type in ("f16", "q8_0"):
        peak = peak_mib(lambda kind=file_type: export_gguf(weights, directory / f"{kind}.gguf", file_type=kind), "cpu")
        assert peak < 2 * tensor + 30  # a chunk of 2**20 weights in float32, several times in numpy's quantization


def test_a_weight_beyond_float16_is_named(model):
    directory = model("qwen2")
    weights = FinetunedWeights(directory)
    base = weights.base
    weights.base = lambda name: base(name).float() * (1e6 if "down_proj" in name else 1)
    with pytest.raises(ValueError, match=r"'blk\.0\.ffn_down\.weight' has values .* not finite in F16.*--type bf16"):
        export_gguf(weights, directory / "m.gguf")


def test_tied_embeddings_and_float32_vectors(model):
    directory = model("qwen2")
    reader = GGUFReader(export_gguf(FinetunedWeights(directory), directory / "m.gguf").path)
    tensors = {each.name: each for each in reader.tensors}
    assert "output.weight" not in tensors
    assert "blk.0.attn_q.bias" in tensors
    assert {each.tensor_type.name for each in reader.tensors if len(each.shape) == 1} == {"F32"}
