"""Tokenizers in GGUF's terms: llama.cpp splits texts into the same tokens, and ends answers where training did."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from lightning_qlora.modules.checkpoints.tokenizer import load_tokenizer
from lightning_qlora.modules.export._gguf_tokenizer import _HASHES, _PROBE, _SPLITS, read_vocabulary, turn_end_token
from lightning_qlora.modules.export.gguf import export_gguf
from lightning_qlora.modules.export.llama_cpp_process import LlamaCpp
from lightning_qlora.modules.export.weights import FinetunedWeights
from tests.modules.export.gguf_models import VOCAB_SIZE, save_model, save_sentencepiece, value

TRICKY = (
    _PROBE,
    "Hello  World's 12345 abc123\n\n\tdef f(x):\n    return x  # été ÀÉÎ",
    " a",
    "x \n y",
    "ABCdef ABC'S 1.5",
)


def train(size: int = VOCAB_SIZE) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary whose merges cross words, digits and punctuation: only splitting keeps them apart."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size - 4, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False, min_frequency=1,
    )  # fmt: skip
    backend.train_from_iterator(list(TRICKY), trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def split_by(rules: tuple[str, ...]) -> pre_tokenizers.PreTokenizer:
    parts: list[Any] = []
    for rule in rules:
        if rule == "digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif rule != "gpt2":
            parts.append(pre_tokenizers.Split(Regex(rule), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="gpt2" in rules))
    return pre_tokenizers.Sequence(parts)


@pytest.mark.parametrize(("key", "pre"), _SPLITS.items(), ids=_SPLITS.values())
def test_llama_cpp_splits_as_the_tokenizer(key, pre, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the extra llama.cpp")
    rules, ignore_merges = key
    vocab, merges = train()
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = split_by(rules), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    path = export_gguf(FinetunedWeights(save_model(tmp_path, "llama")), tmp_path / "m.gguf").path
    assert value(path, "tokenizer.ggml.pre") == pre
    tokenizer = load_tokenizer(tmp_path)
    # For these two, llama.cpp has patterns of its own that take combining marks, as Khmer has in the probe, otherwise.
    texts = TRICKY[1:] if pre in ("tekken", "gpt-4o") else TRICKY
    with LlamaCpp(path) as llama:
        for text in texts:
            assert llama.tokenize(text, add_special=True) == tokenizer(text)["input_ids"]


def test_transformers_own_tokenizer_is_recognised(tmp_path):
    vocab, merges = train()
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    assert read_vocabulary(tokenizer, VOCAB_SIZE).pre == "qwen2"


def test_a_known_hash_comes_first(tiny_llama_dir, monkeypatch):
    tokenizer = load_tokenizer(tiny_llama_dir)
    assert read_vocabulary(tokenizer, 300).pre == "gpt-2"
    digest = hashlib.sha256(str(tokenizer.encode(_PROBE)).encode()).hexdigest()
    monkeypatch.setitem(_HASHES, digest, "olmo")
    assert read_vocabulary(tokenizer, 300).pre == "olmo"


def changed(source: Path, target: Path, change: Any) -> Any:
    """The tokenizer of ``source`` with ``change(tokenizer_json, tokenizer_config)`` made."""
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, target)
    files = [target / "tokenizer.json", target / "tokenizer_config.json"]
    contents = [json.loads(file.read_text()) for file in files]
    change(*contents)
    for file, content in zip(files, contents, strict=True):
        file.write_text(json.dumps(content))
    return load_tokenizer(target)


REFUSED = {
    "another split": (
        lambda t, c: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\d+"}, "behavior": "Isolated", "invert": False},
            t["pre_tokenizer"]]}),
        r"is unknown\. Neither the sha256 .* nor how it splits text \(\\d\+ then gpt2, ignore_merges=False",
    ),
    "a space in front": (lambda t, c: t["pre_tokenizer"].update(add_prefix_space=True), "a space before every text"),
    "neither kind": (lambda t, c: t.update(pre_tokenizer={"type": "Whitespace"}), "neither byte-level BPE"),
    "another model": (
        lambda t, c: t.update(model={"type": "WordLevel", "vocab": t["model"]["vocab"], "unk_token": "a"}),
        "'WordLevel'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_other_tokenizers_are_refused(change, message, tiny_llama_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_vocabulary(changed(tiny_llama_dir, tmp_path / "t", change), 300)


def test_a_vocabulary_beyond_the_embeddings(tiny_llama_dir, tmp_path):
    tokenizer = load_tokenizer(tiny_llama_dir)
    size = len(tokenizer)
    with pytest.raises(ValueError, match=f"but the model embeds {size - 1}"):
        read_vocabulary(tokenizer, size - 1)
    tokenizer.add_tokens(["<image>"])
    vocabulary = read_vocabulary(tokenizer, size)
    assert vocabulary.notes == ("The model has no embeddings of 1 added tokens, which are left out: <image>.",)
    padded = read_vocabulary(load_tokenizer(tiny_llama_dir), size + 2)
    assert padded.tokens[-1] == f"[PAD{size + 1}]"
    assert padded.types[-2:] == [TokenType.UNUSED] * 2


def test_kinds_of_tokens(tiny_llama_dir):
    tokenizer = load_tokenizer(tiny_llama_dir)
    tokenizer.add_tokens(["<tool>"])
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert vocabulary.types[tokenizer.convert_tokens_to_ids("<|im_start|>")] == TokenType.CONTROL
    assert vocabulary.types[tokenizer.convert_tokens_to_ids("<tool>")] == TokenType.USER_DEFINED
    assert vocabulary.types[tokenizer.convert_tokens_to_ids("a")] == TokenType.NORMAL
    assert (vocabulary.add_bos, vocabulary.add_eos, vocabulary.special["pad"]) == (False, False, 0)


def test_the_end_of_a_turn_ends_answers(tiny_llama_dir, tmp_path):
    def end_of_text(raw: dict[str, Any], config: dict[str, Any]) -> None:
        config["eos_token"] = "<|endoftext|>"

    tokenizer = changed(tiny_llama_dir, tmp_path / "t", end_of_text)
    assert turn_end_token(tokenizer) == 2
    vocabulary = read_vocabulary(tokenizer, 300, [1, 0, 5, 6])
    assert vocabulary.stop_tokens == (2, 0, 1, 5, 6)
    assert {name: vocabulary.special[name] for name in ("eos", "eot", "eom")} == {"eos": 0, "eot": 2, "eom": 1}
    assert any("three tokens that end an answer; not among them are" in note for note in vocabulary.notes)
    tokenizer.chat_template = None
    assert turn_end_token(tokenizer) is None
    assert read_vocabulary(tokenizer, 300).stop_tokens == (0,)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="chat template refuses a question and an answer: no"):
        turn_end_token(tokenizer)


@pytest.mark.parametrize("prefix", [True, False], ids=["Llama 2", "Gemma"])
def test_sentencepiece(prefix, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs the extra llama.cpp")
    save_sentencepiece(tmp_path, prefix=prefix)
    tokenizer = load_tokenizer(tmp_path)
    vocabulary = read_vocabulary(tokenizer, VOCAB_SIZE)
    assert (vocabulary.model, vocabulary.pre, vocabulary.add_space_prefix) == ("llama", "default", prefix)
    assert vocabulary.notes == ()
    assert [vocabulary.types[i] for i in (0, 1, 5, -1)] == [
        TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE, TokenType.UNUSED,
    ]  # fmt: skip
    path = export_gguf(FinetunedWeights(save_model(tmp_path, "mistral")), tmp_path / "m.gguf").path
    with LlamaCpp(path) as llama:
        for text in (*TRICKY, "what is   the lighthouse", "<tool>what</s>is<end_of_turn>\n"):
            assert llama.tokenize(text, add_special=True) == tokenizer(text)["input_ids"], text


def test_merges_that_no_sentencepiece_model_has_are_said(tmp_path):
    save_sentencepiece(tmp_path, prefix=True)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    joins: dict[str, list[str]] = {"".join(pair): pair for pair in reversed(raw["model"]["merges"])}
    assert len(joins) < len(raw["model"]["merges"])
    raw["model"]["merges"] = list(joins.values())  # one for each token, as trained BPE has
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    notes = read_vocabulary(load_tokenizer(tmp_path), VOCAB_SIZE).notes
    assert len(notes) == 1
    assert "that llama.cpp joins are no merges of the tokenizer" in notes[0]
