"""A transformers tokenizer in GGUF's terms: vocabulary, merges, special tokens, the tokens that end an answer.

All of it is read from the fast tokenizer that training used, SentencePiece models included, which transformers has
turned into one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

_SPACE = "\u2581"  # how SentencePiece writes a space

#: The text whose token ids tell llama.cpp's converter which pre-tokenizer a vocabulary goes with: a constant of the
#: format, https://github.com/ggml-org/llama.cpp/pull/6920.
_PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f (multiple "
    "emojis concatenated) \u2705 \U0001f999\U0001f999 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "\u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f\u17a2\u17b6\u1785\U0001f601 ?\u6211\u60f3\u5728"
    "apple\u5de5\u4f5c1314151\u5929\uff5e ------======= \u043d\u0435\u0449\u043e \u043d\u0430 \u0411\u044a\u043b\u0433"
    "\u0430\u0440\u0441\u043a\u0438 ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)

#: sha256 of the probe's token ids -> ``tokenizer.ggml.pre``, for the tokenizers of the families here.
_HASHES = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # Llama 3
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",  # SmolLM, SmolLM2
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",  # Qwen 1.5 to 3
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",  # Mistral Nemo
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "olmo",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",  # OLMo 2, Phi-4
    "7dec86086fcc38b66b7bc1575a160ae21cf705be7718b9d5598190d7c12db76f": "superbpe",
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",  # Granite 3
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",  # Phi-4-mini
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION, _PUNCTUATION_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

#: How a tokenizer of another vocabulary splits text before merging, and whether it takes whole words of the vocabulary
#: without merging -> ``tokenizer.ggml.pre``. GPT-2's pattern is built into ``ByteLevel``.
_SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((f"{_CONTRACTIONS}|{_LETTERS}|\\p{{N}}{{1,3}}|{_PUNCTUATION}|{_END}",), True): "llama-bpe",
    ((f"{_CONTRACTIONS}|{_LETTERS}|\\p{{N}}{{1,3}}|{_PUNCTUATION}|{_END}",), False): "dbrx",
    ((f"{_CONTRACTIONS}|{_LETTERS}|\\p{{N}}|{_PUNCTUATION}|{_END}",), False): "qwen2",
    ((f"{_CASES[0]}|{_CASES[1]}|\\p{{N}}|{_PUNCTUATION_SLASH}|{_END}",), True): "tekken",
    (
        (
            f"{_CASES[0]}{_CONTRACTIONS}?|{_CASES[1]}{_CONTRACTIONS}?|\\p{{N}}{{1,3}}|{_PUNCTUATION_SLASH}|{_END}",
        ),
        False,
    ): "gpt-4o",
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece).
        pre: ``tokenizer.ggml.pre``.
        tokens: By id.
        types: GGUF's token type by id.
        merges: ``"left right"``, in order, of byte-level BPE.
        scores: By id, of SentencePiece: the higher, the earlier merged.
        special: ``bos``, ``eos``, ``eot``, ``eom``, ``unk``, ``pad`` -> id.
        add_bos: Whether the first token is put before every text.
        add_eos: Whether the last token is put after every text.
        add_space_prefix: Whether a space is put before every text.
        chat_template: Jinja source.
        stop_tokens: The ids that end an answer: the token that the chat template writes after the assistant's words,
            which training taught, and those of the tokenizer and the generation configuration.
        notes: What the user should know.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None
    stop_tokens: tuple[int, ...]
    notes: tuple[str, ...]

    def write(self, writer: GGUFWriter) -> None:
        """Write it as ``tokenizer.*`` keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: Sequence[int] = (), control: Sequence[str] = ()
) -> Vocabulary:
    """A fast tokenizer of transformers in GGUF's terms.

    Args:
        tokenizer: The one that training used.
        vocab_size: Rows of the embeddings.
        eos_ids: What the generation configuration calls ends of text, most important first.
        control: Tokens that no text consists of although the tokenizer does not call them special, such as an image's.

    Raises:
        ValueError: If llama.cpp has no such tokenizer, or its vocabulary is larger than the embeddings.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; GGUF export reads fast ones.")
    raw: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model, notes = raw["model"], list[str]()
    if model["type"] != "BPE":
        raise ValueError(
            f"The tokenizer is of the type {model['type']!r}. Only byte-level BPE (Llama 3, Qwen, ...) and "
            "SentencePiece's BPE (Llama 2, Mistral, Gemma, Phi-3) can be exported."
        )
    kind, pre = _kind(tokenizer, raw)
    tokens, types = _tokens(raw, vocab_size, kind, tokenizer.unk_token, notes)
    stop_tokens = _stop_tokens(tokenizer, eos_ids)
    marks = [token for token in tokenizer.convert_tokens_to_ids(list(control)) if token is not None]
    for token in (*stop_tokens, *marks):
        if token < vocab_size and types[token] == TokenType.USER_DEFINED:  # llama.cpp would write it into the answer
            types[token] = TokenType.CONTROL
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    first = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    add_bos = len(first) > len(plain) and first[0] == tokenizer.bos_token_id
    add_eos = len(first) > len(plain) and first[-1] == tokenizer.eos_token_id
    if len(first) != len(plain) + add_bos + add_eos:
        raise ValueError(f"The tokenizer turns 'a' into {first}: more than its text and the bos and eos tokens.")
    return Vocabulary(
        kind,
        pre,
        tokens,
        types,
        merges=[f"{left} {right}" for left, right in merges] if kind == "gpt2" else [],
        scores=_scores(tokens, types, merges, notes) if kind == "llama" else [],
        special=_special(tokenizer, stop_tokens, notes),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=kind == "llama" and _space_prefix(tokenizer, notes),
        chat_template=_chat_template(tokenizer),
        stop_tokens=stop_tokens,
        notes=tuple(notes),
    )


def _parts(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The members of a pre-tokenizer or normalizer, whether it is a sequence or not."""
    if component is None:
        return []
    return list(component[key]) if component["type"] == "Sequence" else [component]


def _kind(tokenizer: PreTrainedTokenizerBase, raw: dict[str, Any]) -> tuple[str, str]:
    """``tokenizer.ggml.model`` and ``tokenizer.ggml.pre``."""
    splits = _parts(raw["pre_tokenizer"], "pretokenizers")
    if not any(part["type"] == "ByteLevel" for part in splits):
        if not raw["model"].get("byte_fallback"):
            raise ValueError(
                "The tokenizer is neither byte-level BPE (it has no ByteLevel pre-tokenizer) nor SentencePiece's BPE "
                "(its model has no byte_fallback)."
            )
        return "llama", "default"
    digest = hashlib.sha256(str(tokenizer.encode(_PROBE)).encode()).hexdigest()
    if digest in _HASHES:
        return "gpt2", _HASHES[digest]
    rules: list[str] = []
    for part in splits:
        if part["type"] == "ByteLevel":
            if part.get("add_prefix_space"):
                raise ValueError("The tokenizer puts a space before every text, as no BPE of llama.cpp does.")
            rules += ["gpt2"] * part.get("use_regex", True)
        elif part["type"] == "Digits":
            rules.append("digits" if part["individual_digits"] else "groups of digits")
        elif part["type"] == "Split" and "Regex" in part["pattern"] and part["behavior"] == "Isolated":
            rules.append(part["pattern"]["Regex"])
        else:
            rules.append(json.dumps(part, sort_keys=True))
    key = (tuple(rules), bool(raw["model"].get("ignore_merges")))
    if key not in _SPLITS:
        raise ValueError(
            f"llama.cpp's name of the tokenizer's pre-tokenizer is unknown. Neither the sha256 of its ids of the probe "
            f"text ({digest}) is in the table, nor how it splits text ({' then '.join(rules) or 'not at all'}, "
            f"ignore_merges={key[1]}). Known: {', '.join(sorted({*_HASHES.values()} | {*_SPLITS.values()}))}. If "
            "llama.cpp has it, add a row to modules/export/_gguf_tokenizer.py."
        )
    return "gpt2", _SPLITS[key]


def _tokens(
    raw: dict[str, Any], vocab_size: int, kind: str, unk: str | None, notes: list[str]
) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [int(TokenType.UNUSED)] * vocab_size
    beyond = []
    for text, number in raw["model"]["vocab"].items():
        if number >= vocab_size:
            raise ValueError(f"The tokenizer's token {text!r} is number {number}, but the model embeds {vocab_size}.")
        tokens[number], types[number] = text, TokenType.NORMAL
        if kind == "llama" and text == unk:
            types[number] = TokenType.UNKNOWN
        elif kind == "llama" and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[number] = TokenType.BYTE
    for added in raw["added_tokens"]:
        text, number = added["content"], added["id"]
        if number >= vocab_size:
            beyond.append(text)
            continue
        if types[number] == TokenType.UNKNOWN:
            continue
        if kind == "llama" and _SPACE in text and not added["special"]:
            # One that stands for spaces in the text as it was before they were rewritten is found by merging only.
            if not added["normalized"] and types[number] == TokenType.NORMAL:
                continue
            text = text.replace(_SPACE, " ") if added["normalized"] else text
        tokens[number] = text
        types[number] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if beyond:
        notes.append(
            f"The model has no embeddings of {len(beyond)} added tokens, which are left out: {', '.join(beyond[:5])}."
        )
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: Sequence[tuple[str, ...]], notes: list[str]) -> list[float]:
    """SentencePiece's scores: 0, -1, ... in the order in which tokens are merged, then single characters."""
    order: dict[str, int] = {}
    for left, right in merges:
        order.setdefault(left + right, len(order))
    # llama.cpp merges any two tokens whose join is one, by its score alone.
    known, pairs = {text for text, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}, set(merges)
    missing = sum(
        (text[:cut], text[cut:]) not in pairs
        for text in order
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    )
    if missing:
        notes.append(
            f"{missing} pairs of tokens that llama.cpp joins are no merges of the tokenizer, which was not made by "
            "SentencePiece: some texts may be split otherwise."
        )
    scores, rest = [], len(order)
    for text, kind in zip(tokens, types, strict=True):
        if kind != TokenType.NORMAL:
            scores.append(-10000.0 if kind == TokenType.UNUSED else 0.0)
        elif text in order:
            scores.append(-float(order[text]))
        else:
            scores.append(-float(rest))
            rest += 1
    return scores


def _space_prefix(tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> bool:
    """Whether a space is put before texts: llama.cpp does so at their beginning and after special tokens, or never."""

    def begins_with_space(ids: list[int]) -> bool:
        return str(tokenizer.convert_ids_to_tokens(ids[0])).startswith(_SPACE)

    at_start = begins_with_space(tokenizer("a", add_special_tokens=False)["input_ids"])
    special = tokenizer.bos_token or tokenizer.eos_token
    if special is None:
        return at_start
    after_special = begins_with_space(tokenizer(f"{special}a", add_special_tokens=False)["input_ids"][1:])
    if at_start != after_special:
        notes.append(
            "The tokenizer puts a space before a text but not after a special token; llama.cpp knows only both or "
            f"none. It will {'not do so, as chats need' if tokenizer.chat_template else 'do so'}."
        )
        return not tokenizer.chat_template
    return at_start


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """A chat as text. Templates of vision-language models may take contents as lists of typed parts only: as strings,
    they leave them out or refuse them.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        if all(message["content"].strip() in str(text) for message in messages):
            return str(text)
    except (jinja2.TemplateError, TypeError):
        pass
    typed = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
    return str(tokenizer.apply_chat_template(typed, tokenize=False, add_generation_prompt=add_generation_prompt))


def turn_end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The last special or added token that the chat template writes after an assistant's words, with which training
    taught the model to end; ``None`` without a template, or if it writes none.
    """
    if not tokenizer.chat_template:
        return None
    question = [{"role": "user", "content": "a"}]
    try:
        before = render_chat(tokenizer, question, add_generation_prompt=True)
        after = render_chat(tokenizer, [*question, {"role": "assistant", "content": "b"}])
    except jinja2.TemplateError as error:
        raise ValueError(f"The tokenizer's chat template refuses a question and an answer: {error}") from error
    turn = after[len(before) :] if after.startswith(before) else after[after.rindex("b") :]
    markers = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    ends = [token for token in tokenizer(turn, add_special_tokens=False)["input_ids"] if token in markers]
    return int(ends[-1]) if ends else None


def _stop_tokens(tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> tuple[int, ...]:
    candidates = [turn_end_token(tokenizer), tokenizer.eos_token_id, *eos_ids]
    return tuple(dict.fromkeys(int(token) for token in candidates if token is not None))


def _special(tokenizer: PreTrainedTokenizerBase, stops: tuple[int, ...], notes: list[str]) -> dict[str, int]:
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else (stops[0] if stops else None)
    others = [token for token in stops if token != eos]
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": eos,
        # Further ends of an answer: llama.cpp has two more keys, for the end of a turn and of a message.
        "eot": others[0] if others else None,
        "eom": others[1] if len(others) > 1 else None,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    if len(others) > 2:
        left = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in others[2:])
        notes.append(f"A GGUF file names three tokens that end an answer; not among them are {left}.")
    return {name: int(token) for name, token in found.items() if token is not None}
