"""Tiny random models of every family with tokenizers of both kinds, and exports of them."""

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from lightning_qlora.modules.checkpoints.tokenizer import load_tokenizer
from lightning_qlora.modules.export.gguf import Exported, export_gguf
from lightning_qlora.modules.export.llama_cpp import Verified, verify_gguf
from lightning_qlora.modules.export.weights import FinetunedWeights
from lightning_qlora.modules.models.families import FAMILIES

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


def value(path: Path, key: str) -> Any:
    field = GGUFReader(path).get_field(key)
    return None if field is None else field.contents()


def export(directory: Path, file_type: str = "f16", adapter: Path | None = None) -> tuple[Exported, Verified]:
    weights = FinetunedWeights(directory, adapter)
    exported = export_gguf(weights, directory / f"{file_type}.gguf", file_type=file_type)
    verified = verify_gguf(exported.path, weights, load_tokenizer(directory), file_type, exported.stop_tokens)
    return exported, verified


def save_adapter(model: Path, lora: LoraConfig) -> Path:
    """An adapter of random values in the directory ``adapter`` beside the model."""
    weights = FinetunedWeights(model)
    stock = get_peft_model(FAMILIES[weights.config.model_type].model_class.from_pretrained(model), lora)
    torch.manual_seed(1)
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    stock.save_pretrained(model.parent / "adapter")
    return model.parent / "adapter"
