"""Exported GGUF files compute in a real llama.cpp what transformers computes: families, tokenizers, types, scalings."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from lightning_qlora.modules.checkpoints.tokenizer import load_tokenizer
from lightning_qlora.modules.export.gguf import Exported, export_gguf
from lightning_qlora.modules.export.llama_cpp import LlamaCpp, Verified, verify_gguf
from lightning_qlora.modules.export.weights import FinetunedWeights
from lightning_qlora.modules.models.families import FAMILIES

pytest.importorskip("xllamacpp", reason="needs the extra llama.cpp")
pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB_SIZE = 512

#: What differs from the common tiny shape; each has what its family knows of windows, multipliers, caps and scaling.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
              "attention_bias": True},
    "mistral": {"sliding_window": 200, "head_dim": 24},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 24},
    "smollm3": {"num_hidden_layers": 5},
    "olmo2": {},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
                "logits_scaling": 2.0},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
                                 "original_max_position_embeddings": 256}},
    "gemma2": {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32, "num_hidden_layers": 7,
                    "rope_parameters": {
                        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
}  # fmt: skip

SENTENCEPIECE = {"mistral", "phi3", "gemma2", "gemma3_text"}


def save_model(directory: Path, model_type: str, **options: Any) -> Path:
    """Random weights in float16; norms are not one and biases not zero, so that they matter."""
    family = FAMILIES[model_type]
    torch.manual_seed(0)
    common = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 256, "initializer_range": 0.1,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = family.model_class(family.model_class.config_class(**{**common, **SHAPES[model_type], **options}))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, parameter.mean().item() if "norm" in name else 0.0, 0.2)
    model.half().save_pretrained(directory)
    return directory


def save_sentencepiece(directory: Path, *, prefix: bool) -> None:
    """What transformers makes of a SentencePiece model: BPE with bytes, its merges all pairs that make a token.

    Args:
        directory: Where to.
        prefix: Whether texts begin with a space, as Llama 2's and Mistral's do and Gemma's do not.
    """
    texts = ["what is the capital of the land", "write down how   many ships had passed    the lighthouse"] * 5
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    trained.train_from_iterator([text.replace(" ", "\u2581") for text in texts], trainer)
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    special = ["<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"]
    vocab = {text: i for i, text in enumerate([*special, *(f"<0x{i:02X}>" for i in range(256)), *pieces])}
    merges = [
        (text[:cut], text[cut:])
        for text in pieces
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefix else replace
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    # As Gemma's: runs of spaces are tokens of the vocabulary, but also added ones.
    backend.add_tokens([AddedToken("\u2581\u2581", normalized=False), AddedToken("<tool>", normalized=False)])
    assert "\u2581\u2581" in vocab
    template = (
        "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n{{ message['content'] }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
        chat_template=template,
    ).save_pretrained(directory)  # fmt: skip


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """``model(model_type, **options)``: a directory with random weights and a tokenizer of the family's kind."""

    def save(model_type: str, sentencepiece: bool | None = None, **options: Any) -> Path:
        directory = save_model(tmp_path / "model", model_type, **options)
        if model_type in SENTENCEPIECE if sentencepiece is None else sentencepiece:
            save_sentencepiece(directory, prefix=not model_type.startswith("gemma"))
        else:
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(tiny_llama_dir / name, directory)
        return directory

    return save


def value(path: Path, key: str) -> Any:
    field = GGUFReader(path).get_field(key)
    return None if field is None else field.contents()


def export(directory: Path, file_type: str = "f16", adapter: Path | None = None) -> tuple[Exported, Verified]:
    weights = FinetunedWeights(directory, adapter)
    exported = export_gguf(weights, directory / f"{file_type}.gguf", file_type=file_type)
    verified = verify_gguf(exported.path, weights, load_tokenizer(directory), file_type, exported.stop_tokens)
    return exported, verified


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
