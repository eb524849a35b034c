"""GGUF files as models: the logits are those of the model that a file was written from, or the file is refused."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from lightning_qlora.modules import downloads
from lightning_qlora.modules.checkpoints import gguf
from lightning_qlora.modules.checkpoints.gguf_config import _llama3
from lightning_qlora.modules.checkpoints.resolve import resolve_model
from lightning_qlora.modules.models.families import FAMILIES, load_config
from tests.gguf_files import rope_freqs, write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, 300, (1, 96), generator=torch.Generator().manual_seed(0))

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + i for i in range(8)],
    "attention_factor": 1.19,
}  # fmt: skip
SCALING = {
    "linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    "yarn": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
    "longrope": {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.19},
}

#: Name -> model_type, what differs from the common tiny shape, and what its file has beside the usual.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3}, {}),
    "llama, tied, biased": (
        "llama", {"rope_parameters": LINEAR, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        SCALING["linear"],
    ),
    "llama, yarn": ("llama", {"rope_parameters": YARN}, SCALING["yarn"]),
    "llama, longrope": (
        "llama", {"rope_parameters": LONGROPE}, SCALING["longrope"] | {"rope.scaling.type": "longrope"},
    ),
    "mistral": ("mistral", {"sliding_window": 6}, {"attention.sliding_window": 6}),
    "qwen2": ("qwen2", {"rope_parameters": YARN}, SCALING["yarn"]),
    "qwen3": ("qwen3", {"head_dim": 24}, {}),
    "phi3": ("phi3", {"sliding_window": 6, "original_max_position_embeddings": 64,
                      "rope_parameters": LONGROPE | {"partial_rotary_factor": 1.0}},
             SCALING["longrope"] | {"attention.sliding_window": 6}),
    "gemma2": ("gemma2", {"head_dim": 24, "sliding_window": 6, "query_pre_attn_scalar": 24,
                          "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
               {"attention.sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {"head_dim": 24, "sliding_window": 6, "query_pre_attn_scalar": 24,
                               "layer_types": ["sliding_attention", "full_attention"],
                               "rope_parameters": {"full_attention": LINEAR | {"rope_theta": 1e6},
                                                   "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
               SCALING["linear"] | {"attention.sliding_window": 6, "attention.sliding_window_pattern": 2}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert in this process, which has imported everything."""
    monkeypatch.setattr(gguf, "convert_in_child", gguf._gguf_to_safetensors)


def save(directory: Path, model_type: str, options: Mapping[str, Any], tokenizer_of: Path) -> Path:
    """Random weights in bfloat16, with the tokenizer of another model; norms are not one and biases not zero."""
    torch.manual_seed(0)
    common = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512, "initializer_range": 0.1,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model_class = FAMILIES[model_type].model_class
    model = model_class(model_class.config_class(**common | dict(options)))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    model.to(torch.bfloat16).save_pretrained(directory)
    for file in tokenizer_of.glob("*"):
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, directory)
    return directory


def logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.usefixtures("here")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_a_file_has_the_logits_of_the_model_it_was_written_from(name, tiny_llama_dir, tmp_path):
    model_type, options, keys = MODELS[name]
    source = save(tmp_path / "source", model_type, options, tiny_llama_dir)
    rope = options.get("rope_parameters", {})
    factors = {
        kind: np.array(rope[f"{kind}_factor"], dtype=np.float32) for kind in ("long", "short") if "long_factor" in rope
    }
    tensors = {f"rope_factors_{kind}.weight": values for kind, values in factors.items()}
    directory = resolve_model(write_gguf(source, tmp_path / "m.gguf", keys=keys, tensors=tensors))
    config = load_config(directory)
    assert config.model_type == model_type
    expected, found = logits(source), logits(directory)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # float16 rounds what is below 6e-5
    if rope:  # it matters: without scaling, the logits are others
        plain = json.loads((directory / "config.json").read_text())
        plain["rope_parameters"] = (
            {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in
             (("full_attention", 1e6), ("sliding_attention", 1e4))} if name == "gemma3" else
            {"rope_type": "default", "rope_theta": 10000.0}
        )  # fmt: skip
        (directory / "config.json").write_text(json.dumps(plain))
        assert (logits(directory) - expected).abs().max() > 1e-2
    if name == "llama":
        assert {key: config.rope_parameters[key] for key in LLAMA3} == LLAMA3


@pytest.mark.parametrize(
    ("theta", "head_dim", "numbers"),
    [
        (500000.0, 128, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 8192}),  # 3.1 8B
        (500000.0, 64, {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 8192}),  # 3.2 1B
        (10000.0, 128, {"factor": 5.0, "low_freq_factor": 1.0, "high_freq_factor": 6.5, "original": 3000}),  # fitted
    ],
)
def test_the_numbers_of_llama_3_scaling_are_found_from_what_they_do(theta, head_dim, numbers):
    original = numbers.pop("original")
    rope = {**numbers, "rope_theta": theta, "original_max_position_embeddings": original}
    found = _llama3(rope_freqs(rope, head_dim), theta, head_dim, 131072)
    assert found is not None
    assert found.pop("rope_type") == "llama3"
    assert found == pytest.approx({key: value for key, value in rope.items() if key != "rope_theta"}, rel=1e-3)
    # Twice all three is the same scaling.
    again = rope | {"low_freq_factor": 2.0, "high_freq_factor": 2 * numbers["high_freq_factor"]}
    again["original_max_position_embeddings"] = 2 * original
    assert _llama3(rope_freqs(again, head_dim), theta, head_dim, 131072) == {"rope_type": "llama3", **found}


@pytest.mark.usefixtures("here")
def test_parts_are_joined_whichever_is_named(tiny_llama_dir, tmp_path):
    (tmp_path / "parts").mkdir()
    first = write_gguf(tiny_llama_dir, tmp_path / "parts" / "m.gguf", parts=3)
    files = sorted(first.parent.iterdir())
    assert [file.name for file in files] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    directory = resolve_model(files[1])
    expected = load_file(tiny_llama_dir / "model.safetensors")
    found = load_file(directory / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=0, atol=2**-24)
    assert resolve_model(first) == resolve_model(first.parent) == directory

    shutil.copy(files[0], tmp_path / "alone.gguf")
    with pytest.raises(ValueError, match=r"one of 3 parts of a model \(split\.count\), but its name does not say so"):
        resolve_model(tmp_path / "alone.gguf")
    files[2].unlink()
    for file in files[:2]:
        with pytest.raises(
            ValueError, match=r"one of 3 parts of a model, of which m-00003-of-00003\.gguf are not beside"
        ):
            resolve_model(file)


def change(**options: Any) -> Callable[[Path, Path], Path]:
    return lambda source, path: write_gguf(source, path, **options)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (change(leave_out=lambda name: name.startswith("blk.1.")), r"lacks 9 tensors \('blk\.1\.attn_k\.weight', "),
        (change(leave_out=lambda name: name == "output_norm.weight"), "lacks 'output_norm.weight', which the model"),
        (change(tensors={"blk.0.attn_q.bias": np.ones(64, np.float32)}), r"lacks 7 tensors \('blk\.0\.attn_k\.bias'"),
        (change(tensors={"blk.0.attn_k.bias": np.ones(32, np.float32)}), r"holds 'blk\.0\.attn_k\.bias', which the mo"),
        (change(tensors={"blk.0.ffn_gate_inp.weight": np.ones((4, 64), np.float32)}), "holds 'blk.0.ffn_gate_inp.wei"),
        (change(keys={"expert_count": 4}), r"it has llama\.expert_count = 4, which LlamaForCausalLM cannot express"),
        (change(keys={"attention.scale": 0.5}), r"it has llama\.attention\.scale = 0\.5, which LlamaForCausal"),
        (change(keys={"block_count": 1}), r"holds 9 tensors \('blk\.1\.attn_k\.weight', .*does not take"),
        (change(keys={"feed_forward_length": 96}), r"'blk\.0\.ffn_gate\.weight' has shape \(160, 64\), but its keys"),
        (change(keys={"attention.value_length": 8}), r"llama\.attention\.value_length is 8, which LlamaForCausalLM"),
        (change(keys={"rope.dimension_count": 8}), "it rotates 8 of the 16 dimensions of a head, which LlamaFor"),
        (change(keys={"rope.scaling.type": "sideways"}), r"it has llama\.rope\.scaling\.type = sideways, which Llama"),
        (change(keys={"rope.scaling.type": "linear", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.5}),
         r"it has llama\.rope\.scaling\.attn_factor = 1\.5, which LlamaForCausalLM cannot express"),
        (change(tensors={"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}),
         r"rope_freqs\.weight does not follow the rule of Llama 3\.1's rope scaling, which LlamaForCausalLM cannot"),
        (change(tensors={"rope_factors_long.weight": np.ones(8, np.float32)}), r"it has rope_factors_long\.weight tog"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused(write, message, tiny_llama_dir, tmp_path, empty_cache):
    with pytest.raises(ValueError, match=message) as error:
        resolve_model(write(tiny_llama_dir, tmp_path / "m.gguf"))
    assert str(tmp_path / "m.gguf") in str(error.value)
    assert "Pass --model with" in str(error.value) or "Download it again" in str(error.value)
    assert [path.suffix for path in downloads.conversions_dir().iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.type": "adapter"}, "holds 'adapter', not a language model"),
        ({"general.architecture": "mamba"}, "architecture 'mamba'. GGUF files are read here of llama, qwen2"),
        ({"general.architecture": "granite"}, "architecture 'granite'. GGUF files are read here of llama, qwen2"),
    ],
)
def test_what_is_no_model_of_a_known_architecture_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        gguf.Metadata("m.gguf", fields)


@pytest.mark.usefixtures("here")
def test_conversions_of_another_format_are_made_anew(tiny_llama_dir, tmp_path, monkeypatch):
    path = write_gguf(tiny_llama_dir, tmp_path / "m.gguf")
    now = resolve_model(path)
    monkeypatch.setattr(downloads, "CONVERSION_FORMAT", downloads.CONVERSION_FORMAT + 1)
    later = resolve_model(path)
    assert now != later
    assert now.name == later.name
    assert now.is_dir()
    assert later.is_dir()


@pytest.mark.usefixtures("here")
def test_weights_that_float16_cannot_hold_become_bfloat16(tiny_llama_dir, tmp_path):
    source = shutil.copytree(tiny_llama_dir, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = 70000.0
    save_file(tensors, source / "model.safetensors")
    directory = resolve_model(write_gguf(source, tmp_path / "m.gguf"))
    found = load_file(directory / "model.safetensors")
    torch.testing.assert_close(found, tensors, rtol=0, atol=0)
    assert LlamaConfig.from_pretrained(directory).dtype == torch.bfloat16


def test_every_token_that_ends_an_answer_is_a_stop_token(tiny_llama_dir):
    config = LlamaConfig.from_pretrained(tiny_llama_dir)
    fields = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2}
    assert gguf._generation_config(fields, config).eos_token_id == [2, 7]
    found = gguf._generation_config({"tokenizer.ggml.eos_token_id": 2}, config)
    assert isinstance(found, GenerationConfig)
    assert found.eos_token_id == 2
