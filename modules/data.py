"""Chats in, batches out: reading, tokenizing with the loss on completions only, and an order that survives a restart.

Three properties hold together and are what the training loop stands on:

* **The order depends on (seed, epoch) alone.** Global batch k holds the same samples in the same order on one device
  and on eight, so that losses can be compared step by step (:class:`GlobalBatchSampler`).
* **Every rank takes the same number of steps.** Where the end of an epoch leaves a rank without a sample, it gets a
  blank one that adds nothing to the loss, so that collectives stay in step.
* **A restart continues with the next sample that was not trained on**, whatever had been prefetched
  (:class:`ResumableDataLoader`).

With packing, what is ordered, dealt and resumed are packs: rows of several samples, each a *document* that attends to
itself alone.

Shapes: B = samples (or packs) in a batch of one rank, S = the longest of the batch, rounded up.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import datasets
import jinja2
import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import PreTrainedTokenizerBase

from lightning_qlora.modules.packing import pack_samples
from lightning_qlora.modules.stdlib_docs import Chat, stdlib_api_cards

DEFAULT_DATASET = "stdlib-api-cards"
IGNORE_INDEX = -100
"""The label that cross-entropy leaves out."""

_ROLES = ("system", "user", "assistant")
_PAIR_FIELDS = (("instruction", "response"), ("instruction", "output"), ("prompt", "completion"))


class Sample(TypedDict):
    """One tokenized chat, or a pack of several one after another; the first two lists have the same length."""

    input_ids: list[int]
    labels: list[int]
    """The token itself where the assistant speaks, ``IGNORE_INDEX`` elsewhere."""
    document_lengths: NotRequired[list[int]]
    """Of a pack, the tokens of each of its samples."""


class Batch(TypedDict):
    """What the loaders yield. The counts are Python ints so that reading them never waits for a device."""

    input_ids: torch.Tensor
    """int64 [B, S], padded on the right."""
    attention_mask: torch.Tensor
    """int64 [B, S], 1 on tokens and 0 on padding."""
    labels: torch.Tensor
    """int64 [B, S], ``IGNORE_INDEX`` on prompts and padding; not shifted."""
    num_tokens: int
    """Tokens of real samples, padding and blank samples excluded."""
    num_loss_tokens: int
    """Predictions that count: labels other than ``IGNORE_INDEX`` in ``labels[:, 1:]``."""


class PackedBatch(TypedDict):
    """What the loaders yield with packing. There is no padding mask: padding is a document of its own."""

    input_ids: torch.Tensor
    """int64 [B, S], padded on the right."""
    position_ids: torch.Tensor
    """int64 [B, S], from 0 in each document."""
    document_lengths: list[list[int]]
    """Tokens of each document of each row; a row's sum to S, its padding being its last document. Python ints, so that
    reading them never waits for a device."""
    labels: torch.Tensor
    """int64 [B, S], ``IGNORE_INDEX`` on prompts, padding and the first token of each document; not shifted."""
    num_tokens: int
    """Tokens of real samples, padding and blank packs excluded."""
    num_loss_tokens: int
    """Predictions that count: labels other than ``IGNORE_INDEX`` in ``labels[:, 1:]``."""


# -------------------------------------------------------------------------------------------------------------- reading


def load_chats(dataset: str | Path) -> list[Chat]:
    """Read conversations from the embedded set, a JSON or JSON Lines file, or a data set that ``datasets`` can load.

    A row is one of ``{"messages": [{"role": ..., "content": ...}, ...]}`` with the roles system, user and assistant,
    ``{"instruction": ..., "response": ...}`` (``output`` is understood for ``response``) with an optional ``input``, or
    ``{"prompt": ..., "completion": ...}``.

    Args:
        dataset: ``"stdlib-api-cards"``; a path ending in ``.json`` (one list of rows) or ``.jsonl`` (one row a line);
            or the name of a data set on the hub or of a local directory, whose ``train`` split is read.

    Returns:
        One chat a row, in the order of the source, with nothing but role and content in its messages.

    Raises:
        ValueError: If the source is missing, empty or not JSON (naming the line), or a row cannot be trained on (naming
            it).
    """
    if str(dataset) == DEFAULT_DATASET:
        return stdlib_api_cards()
    path = Path(dataset)
    if path.suffix in (".json", ".jsonl"):
        rows = _read_json(path)
    elif path.is_file():
        raise ValueError(
            f"{path}: unknown file type {path.suffix!r}; save the rows as .json (a list) or .jsonl (one a line)"
        )
    else:
        rows = _read_hub(str(dataset))
    chats = [_to_chat(row, where) for where, row in rows]
    if not chats:
        raise ValueError(f"{dataset}: the data set is empty; it needs at least one row")
    return chats


def _read_json(path: Path) -> Iterator[tuple[str, object]]:
    """Yield (where, row) of a file; ``where`` names the place for error messages."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; pass an existing .json or .jsonl file, or {DEFAULT_DATASET!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        # Not splitlines(): JSON strings may hold U+2028 and friends, which are no line ends here.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}, line {number}", _parse(line, path, first_line=number)
        return
    if not text.strip():
        return
    rows = _parse(text, path, first_line=1)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds a JSON {type(rows).__name__}, not a list of rows; one object a line is .jsonl")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _parse(text: str, path: Path, first_line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        hint = "; one object a line is .jsonl" if path.suffix == ".json" and error.msg == "Extra data" else ""
        raise ValueError(f"{path}, line {line}, column {error.colno}: not JSON: {error.msg}{hint}") from error


def _read_hub(name: str) -> Iterator[tuple[str, object]]:
    try:
        rows = datasets.load_dataset(name, split="train")
    except (
        Exception
    ) as error:  # the hub client raises a dozen unrelated types, from timeouts to parsers of the data files
        raise ValueError(
            f"the data set {name!r} cannot be loaded ({type(error).__name__}: {error}); pass {DEFAULT_DATASET!r}, an "
            "existing .json or .jsonl file, or the name of a data set with a train split on a hub that this machine "
            "can reach"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


def _to_chat(row: object, where: str) -> Chat:
    """Bring a row into the form of a chat, or say what is wrong with it."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object with fields, found {type(row).__name__}")
    if "messages" in row:
        return {"messages": _check_messages(row["messages"], where)}
    for prompt_field, completion_field in _PAIR_FIELDS:
        if prompt_field in row and completion_field in row:
            prompt, completion = row[prompt_field], row[completion_field]
            context = row.get("input") if prompt_field == "instruction" else None
            if context and isinstance(prompt, str) and isinstance(context, str):
                prompt = f"{prompt}\n\n{context}"
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return {"messages": _check_messages(messages, where)}
    raise ValueError(
        f"{where}: found the fields {sorted(map(str, row))}, but a row needs 'messages', or 'instruction' and "
        "'response', or 'prompt' and 'completion'"
    )


def _check_messages(messages: object, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{where}: 'messages' must be a non-empty list of {{role, content}}, found {messages!r:.80}")
    checked: list[dict[str, str]] = []
    for number, message in enumerate(messages, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in _ROLES:
            raise ValueError(f"{where}, message {number}: unknown role {role!r}; known roles: {', '.join(_ROLES)}")
        if not isinstance(content, str) or message.get("tool_calls"):
            raise ValueError(f"{where}, message {number} ({role}): the content must be text and nothing else")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}, message {number} ({role}): character {error.start + 1} is half of a surrogate pair "
                f"({content[error.start]!r}), as a cut emoji leaves, and no tokenizer takes it; mend or remove the row"
            ) from error
        if role == "assistant" and not content.strip():
            raise ValueError(f"{where}, message {number}: empty completion, nothing to learn; remove the row")
        checked.append({"role": role, "content": content})
    roles = [message["role"] for message in checked]
    if "assistant" not in roles:
        raise ValueError(f"{where}: no assistant turn, nothing to learn; remove the row")
    if "user" not in roles[: roles.index("assistant")]:
        raise ValueError(f"{where}: the assistant speaks before any user turn; a chat begins with what it answers")
    return checked


# --------------------------------------------------------------------------------------------------------- tokenization


@dataclass(frozen=True)
class TokenizedChats:
    """Result of :func:`tokenize_chats`."""

    samples: list[Sample]
    kept: list[int]
    """For each sample, the index of its chat."""
    num_truncated: int
    """Kept samples that lost tokens at the end."""
    num_dropped: int
    """Chats whose completions were cut away entirely."""


def tokenize_chats(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], seq_len: int) -> TokenizedChats:
    """Tokenize chats with the tokenizer's own chat template, with labels on what the assistant says.

    Labels cover the content of every assistant turn and the token that ends the turn, so that the model learns to stop;
    the prompts, the turn headers and what the template writes after the end token carry ``IGNORE_INDEX``. A token that
    begins in the header and ends in the content carries it too: in generation the header is given and such a token
    never comes up.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        chats: Conversations as :func:`load_chats` returns them.
        seq_len: Tokens kept of a sample; what is longer loses its end.

    Returns:
        The samples that still have something to learn, and the counts of the others.

    Raises:
        ValueError: If the tokenizer cannot do this, the template does not render a chat as a continuation of its
            beginning, or no sample is left.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2, got {seq_len}: the first token of a sample is never predicted")
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer without character offsets; load one with use_fast=True"
        )
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, so it is unknown how turns are written; use an instruct model's "
            "tokenizer, or set tokenizer.chat_template to the Jinja template the model is to be trained on"
        )
    rendered = [_render(tokenizer, chat["messages"], number) for number, chat in enumerate(chats, start=1)]
    # The templates write every special token themselves, the one that opens the text included.
    encoded = tokenizer([text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True)
    markers = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    samples: list[Sample] = []
    kept: list[int] = []
    num_truncated = 0
    for index, (_, turns) in enumerate(rendered):
        ids: list[int] = encoded["input_ids"][index]
        labels = _completion_labels(ids, encoded["offset_mapping"][index], turns, markers, number=index + 1)[:seq_len]
        if all(label == IGNORE_INDEX for label in labels[1:]):
            continue
        samples.append({"input_ids": ids[:seq_len], "labels": labels})
        kept.append(index)
        num_truncated += len(ids) > seq_len
    if not samples:
        raise ValueError(
            f"seq_len={seq_len} cuts away the completion of all {len(chats)} samples, so nothing is left to learn; "
            f"raise seq_len (the longest sample has {max(map(len, encoded['input_ids']), default=0)} tokens)"
        )
    return TokenizedChats(samples, kept, num_truncated, num_dropped=len(chats) - len(samples))


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], number: int
) -> tuple[str, list[tuple[int, int]]]:
    """Return a chat's text and the [start, end) characters of its assistant turns, end markers included."""

    def render(count: int, header: bool = False) -> str:
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=header)
        assert isinstance(text, str)
        return text

    try:
        text = render(len(messages))
        turns = []
        for position, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = render(position, header=True), render(position + 1)
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"chat {number}, message {position + 1}: the chat template does not write a conversation as a "
                    "continuation of its beginning (some templates rewrite earlier turns), so the completion cannot "
                    "be located; split the chat into single-turn ones, or set tokenizer.chat_template to a template "
                    "that only appends"
                )
            turns.append((len(before), len(after)))
    except jinja2.TemplateError as error:
        raise ValueError(f"chat {number}: the tokenizer's chat template refuses it: {error}") from error
    return text, turns


def _completion_labels(
    ids: list[int], offsets: list[tuple[int, int]], turns: list[tuple[int, int]], markers: set[int], number: int
) -> list[int]:
    """Return the token ids from the start of each turn to its last marker token, ``IGNORE_INDEX`` elsewhere."""
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in turns:
        inside = [i for i, (begin, stop) in enumerate(offsets) if start <= begin and stop <= end]
        ends = [i for i in inside if ids[i] in markers]
        if not ends:
            raise ValueError(
                f"chat {number}: the chat template does not end an assistant turn with a special token, so a model "
                "trained on it would never stop; write tokenizer.eos_token after the assistant's content in "
                "tokenizer.chat_template"
            )
        for i in inside:
            if i <= ends[-1]:
                labels[i] = ids[i]
    return labels


def choose_pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: the tokenizer's pad token, or another special token where that one ends texts as well.

    Code that finds the end of a sample by its padding would otherwise hide the end-of-text token from the model. The
    tokenizer is not changed.

    Raises:
        ValueError: If the vocabulary has no special token to spare.
    """
    eos = tokenizer.eos_token_id
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != eos:
        return int(tokenizer.pad_token_id)
    in_use = {eos, tokenizer.bos_token_id}
    spare = {token: i for token, i in tokenizer.get_added_vocab().items() if i not in in_use}
    candidates = [token for token in spare if "pad" in token.lower()]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in in_use:
        spare[tokenizer.unk_token] = tokenizer.unk_token_id
        candidates.append(tokenizer.unk_token)
    candidates += [token for token in spare if "reserved" in token.lower()]
    if not candidates:
        raise ValueError(
            f"the tokenizer pads with {tokenizer.pad_token!r}, which is None or its end-of-text token, and no other "
            "token is free for it; set tokenizer.pad_token to a token of the vocabulary that texts do not use"
        )
    rank_zero_info(f"pad token {tokenizer.pad_token!r} is None or ends texts: padding with {candidates[0]!r} instead")
    return int(spare[candidates[0]])


# ------------------------------------------------------------------------------------------------------- order, batches


class ChatDataset(Dataset[Sample]):
    """Tokenized chats, plus one blank sample at index ``len(self)``: a single token without a label.

    Args:
        samples: The tokenized chats.
        blank_token_id: The token of the blank sample, usually the pad token.
    """

    def __init__(self, samples: Sequence[Sample], blank_token_id: int) -> None:
        # Arrow holds the lists: compact, and shared with loader workers instead of copied. Built in memory, so no cache
        # files.
        self.rows = datasets.Dataset.from_list(list(samples)) if samples else []
        self.blank: Sample = {"input_ids": [blank_token_id], "labels": [IGNORE_INDEX]}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        if index == len(self):
            return self.blank
        row: Sample = self.rows[index]
        return row


class GlobalBatchSampler(DistributedSampler[int]):
    """Deal the samples of each global batch to the ranks, one by one.

    Global batch k is items ``[k * G, (k + 1) * G)`` of the epoch's order, G = ``num_replicas * batch_size``, and rank r
    takes every ``num_replicas``-th item of it from r on. The order depends on ``seed`` and the epoch only, so that the
    same G gives the same global batches for any number of ranks. The last global batch of an epoch may be short:
    nothing is repeated or dropped. A rank that would get nothing of it yields the index ``len(dataset)``, the blank
    sample of :class:`ChatDataset`.

    It feeds a ``DataLoader`` that has the same ``batch_size`` and ``drop_last=False``. Being a ``DistributedSampler``,
    Lightning keeps it as it is and calls :meth:`set_epoch`.

    Args:
        dataset: What the indices point into.
        batch_size: Samples of one batch on one rank.
        num_replicas: Number of ranks.
        rank: This rank.
        shuffle: Draw a new order each epoch; else the order of the data set.
        seed: Non-negative seed of the order, the same on all ranks.

    Raises:
        ValueError: For a batch size below 1, a negative seed, or a rank outside of ``[0, num_replicas)``.
    """

    def __init__(
        self,
        dataset: ChatDataset,
        *,
        batch_size: int,
        num_replicas: int,
        rank: int,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        _require(batch_size=(batch_size, 1), seed=(seed, 0))
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.dataset_size = len(dataset)
        self.batch_size = batch_size
        self.start_batch = 0
        """Batches the next iteration leaves out; it applies once, and ``len()`` does not change."""
        self.epoch_offset = 0
        """Added to the epoch that ``set_epoch`` announces."""

    @property
    def global_batch_size(self) -> int:
        """Samples of a full batch over all ranks."""
        return self.num_replicas * self.batch_size

    @property
    def num_batches(self) -> int:
        """Batches an epoch has, on every rank."""
        return math.ceil(self.dataset_size / self.global_batch_size)

    def __len__(self) -> int:
        """Indices this rank yields in a whole epoch, blank ones included."""
        full_batches, tail = divmod(self.dataset_size, self.global_batch_size)
        own_tail = max(1, len(range(self.rank, tail, self.num_replicas))) if tail else 0
        return full_batches * self.batch_size + own_tail

    def __iter__(self) -> Iterator[int]:
        start, self.start_batch = self.start_batch, 0
        order: Sequence[int] = range(self.dataset_size)
        if self.shuffle:
            # Not a torch.Generator: its manual_seed keeps 32 bits, and seed + epoch would repeat the next seed's
            # orders.
            order = (
                np.random.default_rng([self.seed, self.epoch + self.epoch_offset])
                .permutation(self.dataset_size)
                .tolist()
            )
        for first in range(start * self.global_batch_size, self.dataset_size, self.global_batch_size):
            own = order[first : first + self.global_batch_size][self.rank :: self.num_replicas]
            yield from own or [self.dataset_size]

    def identity(self) -> dict[str, int]:
        """What must not change between a checkpoint and its resume for the order to go on."""
        return {"global_batch_size": self.global_batch_size, "dataset_size": self.dataset_size, "seed": self.seed}


class ResumableDataLoader(DataLoader[Sample]):
    """A ``DataLoader`` whose place in the epoch goes into Lightning's checkpoints and comes back from them.

    The place is what the training loop has *processed*, not what workers have prefetched, counted in samples over all
    ranks, so that a run continues on another number of ranks with the same global batch. The state holds the epoch too:
    with ``max_steps``, Lightning 2.6 counts one epoch too many after a resume from a checkpoint written at the end of
    an epoch or of the run, and the order must not skip one.

    The order is drawn when the first batch is asked for and not before, because Lightning calls ``iter()`` first and
    ``set_epoch`` after it: workers would start on the order of the wrong epoch.

    Args:
        dataset: The samples.
        sampler: Their order on this rank; its batch size is the loader's.
        collate_fn: Makes a batch from samples.
        batches_done: Returns how many batches of the epoch are trained on; ``sampler.num_batches`` or more once the
            loop will take no more of them.
        num_workers: Loader processes; 0 loads in the training process.
    """

    def __init__(
        self,
        dataset: ChatDataset,
        sampler: GlobalBatchSampler,
        collate_fn: Callable[[list[Sample]], Batch | PackedBatch],
        batches_done: Callable[[], int],
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=sampler.batch_size,
            sampler=sampler,
            collate_fn=collate_fn,
            num_workers=num_workers,
            # Each iterator draws a seed for its workers; from the global generator, that would shift the model's
            # dropout.
            generator=torch.Generator().manual_seed(sampler.seed),
        )
        self.order = sampler
        self.batches_done = batches_done
        self._drawn_epoch = 0
        self._resume_epoch: int | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch declares a private iterator class
        if self._resume_epoch is not None:
            self.order.epoch_offset = self._resume_epoch - self.order.epoch
            self._resume_epoch = None
        self._drawn_epoch = self.order.epoch + self.order.epoch_offset
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the first sample of its order that is not trained on, with what they are valid for."""
        if self._resume_epoch is not None:  # loaded and not yet iterated
            epoch, batches = self._resume_epoch, self.order.start_batch
        else:
            epoch, batches = self._drawn_epoch, self.batches_done()
        if batches >= self.order.num_batches:
            epoch, batches = epoch + 1, 0
        return {"epoch": epoch, "next_sample": batches * self.order.global_batch_size, **self.order.identity()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue there with the next iteration.

        Raises:
            ValueError: If the global batch size, the data set's length or the seed is another.
        """
        _refuse_changes(state_dict, self.order.identity())
        self._resume_epoch = state_dict["epoch"]
        self.order.start_batch = state_dict["next_sample"] // self.order.global_batch_size


def _refuse_changes(saved: Mapping[str, object], current: Mapping[str, object]) -> None:
    """Raise if a checkpoint was made for other data or another order than this run has."""
    changed = [f"{key} {saved.get(key)} -> {value}" for key, value in current.items() if saved.get(key) != value]
    if changed:
        raise ValueError(
            f"the checkpoint's place in the data does not fit this run ({', '.join(changed)}): samples would be "
            "repeated or left out; resume with the same data, seq_len, packing, seed and batch_size * devices, or "
            "start a new run"
        )


def _require(**values_and_least: tuple[int, int]) -> None:
    for name, (value, least) in values_and_least.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class ChatCollator:
    """Pad samples to one length on the right.

    Args:
        pad_token_id: Fills ``input_ids``; ``attention_mask`` is 0 there.
        pad_to_multiple_of: S is the longest sample rounded up to a multiple of this: few distinct shapes, tensor cores
            fed.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch of B = ``len(samples)`` samples. A sample of one token without a label counts as blank."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        width = math.ceil(longest / self.pad_to_multiple_of) * self.pad_to_multiple_of
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        labels = _pad_right((sample["labels"] for sample in samples), width, IGNORE_INDEX)
        return {
            "input_ids": _pad_right((sample["input_ids"] for sample in samples), width, self.pad_token_id),
            # A blank sample keeps its one visible token: a row that attends to nothing is NaN in some attention
            # kernels.
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": labels,
            # tokenize_chats keeps no sample shorter than two tokens.
            "num_tokens": int(lengths[lengths > 1].sum()),
            "num_loss_tokens": int((labels[:, 1:] != IGNORE_INDEX).sum()),
        }


@dataclass(frozen=True)
class PackedCollator:
    """Pad packs to one length on the right, and say where their documents are.

    Args:
        pad_token_id: Fills ``input_ids``.
        pad_to_multiple_of: S is the longest pack rounded up to a multiple of this. Packs of one data set differ by
            about a short sample, so nearly all batches have one shape.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, packs: Sequence[Sample]) -> PackedBatch:
        """Return the batch of B = ``len(packs)`` packs, from :func:`join_samples`.

        A sample without ``document_lengths`` is a pack of one document. A pack of one token counts as blank.

        Raises:
            ValueError: If the document lengths of a pack do not sum to its tokens.
        """
        padded = ChatCollator(self.pad_token_id, self.pad_to_multiple_of)(packs)
        width = padded["input_ids"].shape[1]
        document_lengths = []
        for pack in packs:
            tokens = len(pack["input_ids"])
            lengths = list(pack.get("document_lengths", [tokens]))
            if sum(lengths) != tokens or min(lengths) < 1:
                raise ValueError(
                    f"document_lengths {lengths} do not divide the {tokens} tokens of their pack: they must be at "
                    "least 1 and sum to that"
                )
            document_lengths.append([*lengths, width - tokens] if tokens < width else lengths)
        position_ids = torch.stack([torch.cat([*map(torch.arange, lengths)]) for lengths in document_lengths])
        # The last token of a document must not learn to predict the first of the next.
        labels = padded["labels"].masked_fill(position_ids == 0, IGNORE_INDEX)
        return {
            "input_ids": padded["input_ids"],
            "position_ids": position_ids,
            "document_lengths": document_lengths,
            "labels": labels,
            "num_tokens": padded["num_tokens"],
            "num_loss_tokens": int((labels[:, 1:] != IGNORE_INDEX).sum()),
        }


def join_samples(samples: Iterable[Sample]) -> Sample:
    """Return the pack of these samples, in their order."""
    pack: Sample = {"input_ids": [], "labels": [], "document_lengths": []}
    for sample in samples:
        pack["input_ids"] += sample["input_ids"]
        pack["labels"] += sample["labels"]
        pack["document_lengths"].append(len(sample["input_ids"]))
    return pack


def _pad_right(rows: Iterable[list[int]], width: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64)


class ChatDataModule(L.LightningDataModule):
    """Train and validation batches of chats, with the loss on completions only.

    ``load()`` does all the reading and checking and needs no Trainer: call it before building a model, so that bad data
    is refused in seconds. The held-out chats are those whose SHA-256 is smallest: the choice depends on the texts
    alone, not on their order, the seed or the number of devices, and no text is in both parts. At most a tenth of the
    data is held out; a text that is repeated more often than that is trained on.

    With ``packing``, batches are :class:`PackedBatch`, for models that keep documents apart (``QLoRALlama`` does). The
    samples of both parts are packed once, by :func:`~lightning_qlora.modules.packing.pack_samples`; what is shuffled
    each epoch are the packs. The loss of an epoch is that of the unpacked samples, in other batches.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        dataset: Anything :func:`load_chats` reads.
        batch_size: Samples of one batch on one device; with ``packing``, packs.
        seq_len: Tokens kept of a sample; longer ones lose their end.
        packing: Fill rows of at most ``seq_len`` tokens with samples.
        seed: Seed of the training order.
        val_samples: Chats to hold out, but at most a tenth of all.
        num_workers: Loader processes for each loader.
        pad_to_multiple_of: Batches are as long as their longest sample, rounded up to a multiple of this.
        max_position_embeddings: The model's; longer samples are warned of. ``None`` is no limit.

    Raises:
        ValueError: For arguments out of range.
    """

    report_key = "data"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dataset: str | Path = DEFAULT_DATASET,
        *,
        batch_size: int,
        seq_len: int,
        packing: bool = False,
        seed: int = 0,
        val_samples: int = 64,
        num_workers: int = 0,
        pad_to_multiple_of: int = 8,
        max_position_embeddings: int | None = None,
    ) -> None:
        super().__init__()
        _require(
            batch_size=(batch_size, 1),
            seq_len=(seq_len, 2),
            seed=(seed, 0),
            val_samples=(val_samples, 0),
            num_workers=(num_workers, 0),
            pad_to_multiple_of=(pad_to_multiple_of, 1),
        )
        self.tokenizer = tokenizer
        self.source = dataset
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.packing = packing
        self.seed = seed
        self.val_samples = val_samples
        self.num_workers = num_workers
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_position_embeddings = max_position_embeddings
        self.train_set: ChatDataset | None = None
        self.val_set: ChatDataset | None = None
        self.val_chats: list[Chat] = []
        """The held-out chats as text, e.g. for answers before and after training."""
        self.num_dropped = 0
        """Chats left out because ``seq_len`` cuts their completions away."""
        self.num_truncated = 0
        """Samples, train and held out, that lost tokens at the end."""
        self.num_train = 0
        """Samples to train on, packed or not."""
        self.num_val = 0
        """Samples held out, packed or not."""
        self.fill: float | None = None
        """With packing, the part of ``seq_len`` tokens that a training pack holds, on average."""
        self.fingerprint = ""
        """SHA-256 of the training set: equal for the same data, tokenizer, template, ``seq_len`` and ``packing``."""

    def load(self) -> None:
        """Read, check, tokenize and split the data, once; a second call does nothing.

        Raises:
            ValueError: As :func:`load_chats`, :func:`tokenize_chats` and :func:`choose_pad_token_id` do.
        """
        if self.train_set is not None:
            return
        pad_token_id = choose_pad_token_id(self.tokenizer)
        chats = load_chats(self.source)
        tokenized = tokenize_chats(self.tokenizer, chats, self.seq_len)
        chats = [chats[index] for index in tokenized.kept]
        most = min(self.val_samples, len(chats) // 10)
        held_out = _held_out(chats, most)
        train = [sample for sample, out in zip(tokenized.samples, held_out, strict=True) if not out]
        val = [sample for sample, out in zip(tokenized.samples, held_out, strict=True) if out]
        self.val_chats = [chat for chat, out in zip(chats, held_out, strict=True) if out]
        self.num_dropped, self.num_truncated = tokenized.num_dropped, tokenized.num_truncated
        self.num_train, self.num_val = len(train), len(val)
        if self.packing:
            train, val = _pack(train, self.seq_len), _pack(val, self.seq_len)
            self.fill = sum(len(pack["input_ids"]) for pack in train) / (len(train) * self.seq_len)
        self.fingerprint = hashlib.sha256(json.dumps(train).encode()).hexdigest()
        collator = PackedCollator if self.packing else ChatCollator
        self.collator = collator(pad_token_id, self.pad_to_multiple_of)
        self.val_set = ChatDataset(val, pad_token_id)
        self.train_set = ChatDataset(train, pad_token_id)
        rank_zero_info(self._summary())
        if most and not self.num_val:
            rank_zero_info(
                f"nothing is held out: every text is there more than {most} times, and its repetitions stay together"
            )
        longest = max(len(sample["input_ids"]) for sample in tokenized.samples)
        if self.max_position_embeddings is not None and longest > self.max_position_embeddings:
            rank_zero_warn(
                f"The longest sample has {longest} tokens, but the model's config.json says "
                f"max_position_embeddings={self.max_position_embeddings}: it has seen no positions beyond. With a "
                "seq_len of that, such samples lose their end."
            )

    def report_section(self) -> dict[str, Any] | None:
        """For a run's report, under ``report_key``; ``None`` before :meth:`load`.

        ``train_samples``, ``val_samples``, ``truncated`` and ``dropped`` are the ``num_`` attributes; with packing
        there are also ``train_packs`` and ``val_packs``, the rows of both parts, and ``fill``.
        """
        if self.train_set is None or self.val_set is None:
            return None
        section: dict[str, Any] = {
            "train_samples": self.num_train,
            "val_samples": self.num_val,
            "truncated": self.num_truncated,
            "dropped": self.num_dropped,
        }
        if self.packing:
            section |= {"train_packs": len(self.train_set), "val_packs": len(self.val_set), "fill": self.fill}
        return section

    def setup(self, stage: str) -> None:
        """Lightning's hook, run on every rank."""
        self.load()

    def train_dataloader(self) -> ResumableDataLoader:
        """Return the loader of this rank's training batches (:class:`Batch`)."""
        dataset = self._loaded()[0]
        return ResumableDataLoader(dataset, self._sampler(dataset), self.collator, self._batches_done, self.num_workers)

    def val_dataloader(self) -> DataLoader[Sample] | list[DataLoader[Sample]]:
        """Return the loader of this rank's held-out batches, in fixed order; an empty list if nothing is held out."""
        dataset = self._loaded()[1]
        if not len(dataset):
            return []
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=self._sampler(dataset, shuffle=False),
            collate_fn=self.collator,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),  # as in ResumableDataLoader
        )

    def example(self) -> tuple[str, str] | None:
        """Return the last question and answer of the first held-out chat; ``None`` if nothing is held out."""
        self.load()
        for chat in self.val_chats:
            for answer, question in pairwise(chat["messages"][::-1]):
                if (answer["role"], question["role"]) == ("assistant", "user"):
                    return question["content"], answer["content"]
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what the data are, for the check at resume; Lightning stores it in every checkpoint."""
        return self._identity()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint was made with these data.

        Raises:
            ValueError: If the training samples, the seed or the global batch size are others.
        """
        _refuse_changes(state_dict, self._identity())

    def _summary(self) -> str:
        train_set, val_set = self._loaded()
        text = f"{self.source}: {self.num_train} samples to train on, {self.num_val} held out"
        if self.num_truncated or self.num_dropped:
            text += (
                f"; seq_len={self.seq_len} cut the end of {self.num_truncated} of them, and {self.num_dropped} more "
                "are left out, for it cut away what there was to learn"
            )
        if self.fill is not None:
            text += f"; packed into {len(train_set)} and {len(val_set)} rows, {1 - self.fill:.1%} of them empty"
        return text

    def _identity(self) -> dict[str, Any]:
        return {**self._sampler(self._loaded()[0]).identity(), "fingerprint": self.fingerprint}

    def _loaded(self) -> tuple[ChatDataset, ChatDataset]:
        self.load()
        assert self.train_set is not None
        assert self.val_set is not None
        return self.train_set, self.val_set

    def _sampler(self, dataset: ChatDataset, shuffle: bool = True) -> GlobalBatchSampler:
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return GlobalBatchSampler(
            dataset, batch_size=self.batch_size, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=self.seed
        )

    def _batches_done(self) -> int:
        """Batches of the epoch that are trained on; more than there are once the loop has taken its last."""
        if self.trainer is None:
            return 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        # `processed` and not `ready`: a checkpoint written while a batch is in flight (on an exception, say) makes
        # Lightning do that batch again. `completed` lags by one in on_train_batch_end, where most checkpoints are
        # written.
        done: int = progress.current.processed  # type: ignore[attr-defined]  # declared as the tracker's base class
        # With limit_train_batches the last one comes early; num_train batches are past the end in any case.
        return self.num_train if progress.is_last_batch and done == progress.current.ready else done


def _pack(samples: Sequence[Sample], seq_len: int) -> list[Sample]:
    packs = pack_samples([len(sample["input_ids"]) for sample in samples], seq_len)
    return [join_samples(samples[index] for index in pack) for pack in packs]


def _held_out(chats: Sequence[Chat], most: int) -> list[bool]:
    """Mark at most ``most`` chats: those of the smallest SHA-256, each with its repetitions or not at all."""
    digests = [hashlib.sha256(json.dumps(chat, sort_keys=True).encode()).digest() for chat in chats]
    chosen = set()
    for digest, repetitions in sorted(Counter(digests).items()):
        if repetitions <= most:
            chosen.add(digest)
            most -= repetitions
    return [digest in chosen for digest in digests]
