"""A GGUF file in a real llama.cpp: what it answers, and whether that is what the exported model answers.

Shapes: S tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ._gguf_architecture import Names, architecture_of
from ._gguf_tokenizer import render_chat
from ._gguf_types import FILE_TYPES, FileType, convert
from .llama_cpp_process import LlamaCpp
from .weights import FinetunedWeights

#: Questions whose answers are compared: several scripts, digits, code, spaces, and one that is filled up to a few
#: hundred tokens, because errors in positions grow with the distance.
PROMPTS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number:\n\n    def fib(n):\n        ",
    "2, 3, 5, 7, 11, 13, 1700, 190001: which of these are prime?",
    "Übersetze ins Deutsche: \"It's raining, isn't it?\"",
    "日本の首都はどこですか。 Где находится Эйфелева башня? 🗼",
    "List three uses of   copper;  then STOP.",
    "Which year came after 1999, and why did people worry about it?",
)
_LONG = "In the year {} the keeper of the lighthouse wrote down how many ships had passed: {}. "


#: Tokens that are compared one by one at each position; the rest of the vocabulary counts as one more.
LISTED = 1024
_CONTINUATION = 8


@dataclass(frozen=True)
class Verified:
    """How a file answers in llama.cpp, beside the exported model in transformers, computed in float32.

    Attributes:
        positions: Number of positions that were compared.
        kl: Mean KL divergence of llama.cpp's next-token distribution from the model's, in nats. The 1024 likeliest
            tokens count one by one and the others together.
        kl_rounded: The same from the model whose weights are rounded to the file's types: what llama.cpp's own
            arithmetic adds, whatever the types. It tells a fault from quantization.
        top1: Share of the positions at which the likeliest token is the same.
        difference: Largest difference of a log-probability, over tokens that the model gives at least 0.001.
        notes: Differences that are no faults, in sentences.
    """

    positions: int
    kl: float
    kl_rounded: float
    top1: float
    difference: float
    notes: tuple[str, ...]


def verify_gguf(
    path: str | Path,
    weights: FinetunedWeights,
    tokenizer: PreTrainedTokenizerBase,
    file_type: str,
    stop_tokens: Sequence[int] = (),
    *,
    lora: str | Path | None = None,
    prompts: Sequence[str] = PROMPTS,
) -> Verified:
    """Run a file in llama.cpp and compare it with the model that it was made from.

    Tokens of texts and chats must be equal, each stop token must end an answer, and the next-token distributions after
    each prompt and along llama.cpp's own greedy answer must agree: in the 16-bit types to rounding and in their
    likeliest token; in others with those of the model whose weights are rounded as in the file, and within the type's
    bound with those of the model itself.

    Args:
        path: The GGUF file.
        weights: The model.
        tokenizer: Its tokenizer.
        file_type: The file's type.
        stop_tokens: Ids that must end an answer.
        lora: An adapter as a GGUF file, if ``path`` is the base alone.
        prompts: What is asked, as chats if the tokenizer has a chat template; one more, a long one, is added.

    Raises:
        ValueError: If llama.cpp cannot load the file, or a comparison fails: which one, and what may be wrong.
    """
    kind, notes = FILE_TYPES[file_type], list[str]()
    with LlamaCpp(path, context=_context(weights.config), lora=lora) as llama:
        texts = _texts(tokenizer, prompts, llama.context - _CONTINUATION)
        _compare_rendering(llama, tokenizer, notes)
        asked = [_compare_tokens(llama, tokenizer, text, notes) for text in texts]
        asked = [ids for ids in asked if len(ids) + _CONTINUATION < llama.context]
        for token in stop_tokens:
            if not llama.stops_at(token, asked[0]):
                raise ValueError(
                    f"llama.cpp goes on after {tokenizer.convert_ids_to_tokens(token)!r} (token {token}), which "
                    "ends an answer in training. It is missing among the file's stop tokens: answers would not end."
                )
        answers = [llama.greedy(ids, _CONTINUATION) for ids in asked]
        spans = [
            range(len(ids) - 1, len(ids) + max(len(answer) - 1, 0)) for ids, answer in zip(asked, answers, strict=True)
        ]
        rows = [ids + answer for ids, answer in zip(asked, answers, strict=True)]
        expected = _expected(weights, rows, spans)
        rounded = _expected(weights, rows, spans, rounding(path, weights)) if kind.is_quantized else expected
        found = [
            [llama.log_probs(row[: position + 1], min(LISTED, weights.config.vocab_size)) for position in span]
            for row, span in zip(rows, spans, strict=True)
        ]
    verified = summary(found, expected, rounded, tuple(notes))
    judge(verified, kind, found, expected)
    return verified


def _context(config: PretrainedConfig) -> int:
    """The context to compare in. With longrope, llama.cpp chooses the factors by the context that it is started with,
    transformers by the tokens so far: up to the original context both take the short ones.
    """
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    longest = int(config.max_position_embeddings)
    if rope.get("rope_type") == "longrope":
        longest = int(rope["original_max_position_embeddings"])
    return min(longest, 512)


def _texts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], longest: int) -> list[str]:
    """The prompts and a long one, as the model is asked them."""
    long = ""
    for year in range(1801, 1900):
        more = long + _LONG.format(year, year * 7919 % 997)
        if len(tokenizer(more)["input_ids"]) > longest * 3 // 4:
            break
        long = more
    texts = [*prompts, *[long] * bool(long)]
    if not tokenizer.chat_template:
        return texts
    return [render_chat(tokenizer, [{"role": "user", "content": each}], add_generation_prompt=True) for each in texts]


def _compare_rendering(llama: LlamaCpp, tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> None:
    if not tokenizer.chat_template:
        return
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    ours = render_chat(tokenizer, chat, add_generation_prompt=True)
    theirs = llama.render(chat)
    bos = tokenizer.bos_token or ""  # which llama.cpp leaves to the tokenizer
    if ours.removeprefix(bos) != theirs.removeprefix(bos):
        notes.append(f"llama.cpp renders the chat template as {theirs!r}, transformers as {ours!r}.")


def _compare_tokens(llama: LlamaCpp, tokenizer: PreTrainedTokenizerBase, text: str, notes: list[str]) -> list[int]:
    """The ids of a text by the tokenizer, which must be llama.cpp's."""
    # Chat templates write their special tokens themselves.
    add_special = not tokenizer.chat_template
    ours = [int(token) for token in tokenizer(text, add_special_tokens=add_special)["input_ids"]]
    theirs = llama.tokenize(text, add_special=add_special)
    if ours != theirs:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        raise ValueError(
            f"llama.cpp splits {text[:60]!r} into other tokens than the tokenizer does: "
            f"{tokenizer.convert_ids_to_tokens(theirs[at : at + 4])} instead of "
            f"{tokenizer.convert_ids_to_tokens(ours[at : at + 4])} from token {at} on. The file's pre-tokenizer, "
            "merges or special tokens are wrong."
        )
    return ours


def rounding(path: str | Path, weights: FinetunedWeights) -> Callable[[str, Tensor], Tensor]:
    """What a weight becomes when it is stored in the type that it has in the file, which is made anew."""
    types = {each.name: each.tensor_type for each in GGUFReader(path).tensors}
    names = Names(architecture_of(weights.config), weights.config.num_hidden_layers)

    def rounded(name: str, weight: Tensor) -> Tensor:
        if name not in weights.shapes:
            return weight  # of a vision tower, which is not quantized
        kind = GGMLQuantizationType(types[names(name)])
        if kind == GGMLQuantizationType.F32:
            return weight
        return torch.from_numpy(dequantize(convert(weight, kind, name), kind)).view(weight.shape)

    return rounded


def _expected(
    weights: FinetunedWeights,
    rows: list[list[int]],
    spans: list[range],
    rounded: Callable[[str, Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Log-probabilities float32 [positions, V] of each row, short and long rows apart."""
    found: dict[int, Tensor] = {}
    typical = sorted(len(row) for row in rows)[len(rows) // 2]
    for long in (False, True):
        group = [i for i, row in enumerate(rows) if (len(row) > 2 * typical) == long]
        if not group:
            continue
        width = max(len(rows[i]) for i in group)
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in group])
        keep = sorted({position for i in group for position in spans[i]})
        logits = weights.logits(ids, keep=torch.tensor(keep), rounded=rounded)
        for row, i in enumerate(group):
            found[i] = logits[row, [keep.index(position) for position in spans[i]]].log_softmax(-1)
    return [found[i] for i in range(len(rows))]


Found = list[list[tuple[Tensor, Tensor]]]


def summary(found: Found, expected: list[Tensor], rounded: list[Tensor], notes: tuple[str, ...]) -> Verified:
    kls, rounded_kls, same, difference = [], [], 0, 0.0
    for answer, ours, ours_rounded in zip(found, expected, rounded, strict=True):
        for (ids, theirs), reference, reference_rounded in zip(answer, ours, ours_rounded, strict=True):
            kls.append(_kl(reference[ids], theirs))
            rounded_kls.append(_kl(reference_rounded[ids], theirs))
            same += int(reference.argmax()) == int(ids[0])
            likely = reference[ids] > math.log(1e-3)
            difference = max([difference, *(reference[ids] - theirs).abs()[likely].tolist()])
    count = len(kls)
    return Verified(count, sum(kls) / count, sum(rounded_kls) / count, same / count, difference, notes)


def _kl(log_p: Tensor, log_q: Tensor) -> float:
    """Of the listed tokens, and the others as one; rounding may make it less than 0."""
    log_p, log_q = log_p.double(), log_q.double()
    p, q = log_p.exp(), log_q.exp()
    rest_p, rest_q = max(1 - float(p.sum()), 0.0), max(1 - float(q.sum()), 1e-9)
    rest = rest_p * math.log(rest_p / rest_q) if rest_p > 1e-9 else 0.0
    return max(0.0, float((p * (log_p - log_q)).sum()) + rest)


#: Largest difference of a log-probability that rounding explains in the types that are not quantized.
_ROUNDING = {"f32": 0.02, "f16": 0.05, "bf16": 0.3}

#: Largest KL divergence that llama.cpp's arithmetic explains, which rounds activations to 8 bits where weights are
#: quantized: ten times that of SmolLM2-135M.
_ARITHMETIC_KL = 0.03


def judge(verified: Verified, kind: FileType, found: Found, expected: list[Tensor]) -> None:
    causes = "A tensor, the rotary embedding or another number of the file is wrong."
    bounds = (
        ("the model's whose weights are rounded as in the file", verified.kl_rounded, _ARITHMETIC_KL, "arithmetic"),
        ("the model's", verified.kl, kind.kl_bound, kind.name),
    )
    for whose, kl, bound, explanation in bounds:
        if not kl <= bound:
            raise ValueError(
                f"In llama.cpp the next-token distribution has a KL divergence of {kl:.3g} nats from {whose}; "
                f"{explanation} explains up to {bound:g}. {causes}"
            )
    if kind.is_quantized:
        return
    tolerance = _ROUNDING[kind.name]
    if not verified.difference <= tolerance:
        raise ValueError(
            f"In llama.cpp a log-probability differs by {verified.difference:.3g} from the model's; rounding to "
            f"{kind.name} explains up to {tolerance:g}. {causes}"
        )
    for answer, ours in zip(found, expected, strict=True):
        for (ids, _), reference in zip(answer, ours, strict=True):
            # Of two tokens as likely as each other, rounding chooses.
            if float(reference.max() - reference[ids[0]]) > 2 * tolerance:
                own = int(reference.argmax())
                raise ValueError(f"llama.cpp's likeliest token {int(ids[0])} is not the model's, {own}. {causes}")
