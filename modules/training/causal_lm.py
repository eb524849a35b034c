"""The LightningModule of causal language models: QLoRA finetuning on one device or on several, sharded or not.

Shapes: B samples, S tokens per sample, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig
from torch import Tensor

from ..checkpoints.chat_format import ChatFormat
from ..distributed.collectives import gather_objects
from ..losses.functional import cross_entropy
from ..models.causal_lm import LanguageModelHead, QLoRAForCausalLM
from ..models.decoder import Head
from ..models.options import ComputeOptions
from .base import QLoRAModule
from .generation import generate_answers, prompt_of

#: What a batch holds beside the model's inputs: counts, as python ints, so that reading them waits for no device.
_COUNTS = ("num_tokens", "num_loss_tokens")


class QLoRACausalLM(QLoRAModule):
    """Finetunes LoRA adapters on a causal language model whose base is frozen in 4 bits.

    A batch is a dict of the model's inputs: ``input_ids`` and ``labels``, int64 [B, S], right-padded, labels -100 where
    no loss is taken. Attention is causal, so a token never sees the padding to its right: no attention mask is needed.
    A batch of packed rows also has ``position_ids``, int64 [B, S], restarting at 0 for each document, and
    ``document_lengths``, for each row a list of python ints that sum to S. ``num_loss_tokens``, how many of
    ``labels[:, 1:]`` are not -100, as a python int, spares a wait for the device; ``num_tokens`` is for reports.

    Args (all others are those of :class:`QLoRAModule`):
        loss: What is trained: a function of ``losses/functional.py``, or any function of logits [C, V] of C tokens,
            their labels [C] and ``loss_inputs`` [C, ...] that returns one value per token, or their sum; see
            :func:`~lightning_qlora.modules.losses.linear_loss`. Settings are fixed by ``functools.partial``, as in
            ``partial(cross_entropy, label_smoothing=0.1, z_loss=1e-4)``.
        loss_inputs: Names of the batch's tensors [B, S, ...] that ``loss`` takes after the labels; the value at a
            position belongs to the token at that position, as its label does.

    Raises:
        ValueError: As :class:`QLoRAModule`.
    """

    def __init__(
        self,
        model_dir: str | Path,
        lora: LoraConfig | dict[str, Any] | None = None,
        *,
        loss: Callable[..., Any] = cross_entropy,
        loss_inputs: Sequence[str] = (),
        learning_rate: float = 2e-4,
        warmup_steps: int = 0,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        weight_decay: float = 0.0,
        compute: ComputeOptions | dict[str, Any] = ComputeOptions(),  # noqa: B008  frozen
        packing: bool = False,
        compile_backend: str | Callable[..., Any] = "inductor",
        head: Head | None = None,
        init_adapter: str | Path | None = None,
        model_name: str | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(loss, str):
            raise ValueError(
                f"The checkpoint was trained with the loss {loss}, a function that it does not hold. Pass that to "
                "load_from_checkpoint(..., loss=...)."
            )
        super().__init__(
            model_dir, lora, learning_rate=learning_rate, warmup_steps=warmup_steps, schedule=schedule,
            weight_decay=weight_decay, compute=compute, packing=packing, compile_backend=compile_backend,
            head=head or LanguageModelHead(),
            init_adapter=init_adapter, model_name=model_name, seed=seed,
        )  # fmt: skip
        self.loss, self.loss_inputs = loss, tuple(loss_inputs)
        if loss is not cross_entropy:
            self.save_hyperparameters({"loss": repr(loss), "loss_inputs": list(loss_inputs)})
        self._inputs = self.inputs_of(QLoRAForCausalLM)

    @staticmethod
    def inputs_of(model: type[QLoRAForCausalLM]) -> set[str]:
        """What a batch may hold for models of that class."""
        return set(inspect.signature(model.forward).parameters) - {"self", "kwargs"}

    def adapt(self, model: QLoRAForCausalLM) -> None:
        """Give the head the loss to compute."""
        model.lm_head.loss = self.loss

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Logits [B, S, V] of ``input_ids`` int64 [B, S], in the compute dtype."""
        return self._model(input_ids=input_ids, **kwargs).logits  # type: ignore[no-any-return]

    def loss_sum(self, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """The loss of a batch, summed over its tokens that count (float32, 0-dim), and how many these are.

        Raises:
            ValueError: If the batch lacks labels, or holds something that the model does not take.
        """
        inputs = {name: value for name, value in batch.items() if name not in (*_COUNTS, *self.loss_inputs)}
        if unknown := sorted(inputs.keys() - self._inputs):
            raise ValueError(
                f"The batch holds {', '.join(unknown)}, which the model does not take: it would change nothing. Leave "
                "it out of the batch, or name what the loss takes in loss_inputs."
            )
        if missing := [name for name in ("labels", *self.loss_inputs) if name not in batch]:
            raise ValueError(f"The batch lacks {', '.join(missing)}; it holds {', '.join(sorted(batch))}.")
        tokens = batch.get("num_loss_tokens")
        if tokens is None:
            tokens = int((batch["labels"][:, 1:] != -100).sum())
        elif isinstance(tokens, Tensor):  # one per sample, as PyTorch's default collation makes of ints
            tokens = int(tokens.sum())
        # The loss is computed inside the forward of the module that FSDP2 took as its root: only there are weights
        # gathered.
        output = self._model(
            **inputs, loss_inputs=tuple(batch[name] for name in self.loss_inputs), num_items_in_batch=1,
            num_loss_tokens=tokens,
        )  # fmt: skip
        return output.loss, tokens

    @property
    def _chat_format(self) -> ChatFormat:
        return self.chat_format or self._base_chat_format

    @functools.cached_property
    def _base_chat_format(self) -> ChatFormat:  # reading a tokenizer takes a while
        return ChatFormat.of(self.model_dir)

    def answer(self, prompt: str, max_new_tokens: int = 64) -> str:
        """Greedy answer to a one-turn chat with ``prompt``. All ranks of a sharded model must call it together."""
        return self.answers([prompt], max_new_tokens)[0]

    def answers(self, prompts: Sequence[str], max_new_tokens: int = 64, batch_size: int = 16) -> list[str]:
        """Greedy answers to one-turn chats with each of ``prompts``; otherwise as :meth:`complete`."""
        texts = [prompt_of(self._chat_format, [{"role": "user", "content": prompt}]) for prompt in prompts]
        return self.complete(texts, max_new_tokens, batch_size)

    def complete(self, texts: Sequence[str], max_new_tokens: int = 64, batch_size: int = 16) -> list[str]:
        """Greedy answers to many chats, dealt over the ranks, which must all call it together with all chats.

        Args:
            texts: Each ends where the assistant's turn begins, as a chat template writes it.
            max_new_tokens: Tokens after which an answer is cut.
            batch_size: Chats that a rank answers at once.

        Returns:
            On all ranks, all answers.
        """
        if not texts:
            return []
        share = math.ceil(len(texts) / self.trainer.world_size)
        first = self.global_rank * share
        # As many on each rank, because the ranks of a sharded model compute together: the last may repeat some.
        mine = [texts[index % len(texts)] for index in range(first, first + share)]
        training = self.training
        self.eval()
        with self.trainer.precision_plugin.forward_context():
            answers = generate_answers(
                self._model, self._chat_format, mine, device=self.device, max_new_tokens=max_new_tokens,
                batch_size=batch_size,
            )  # fmt: skip
        self.train(training)
        return [text for part in gather_objects(answers) for text in part][: len(texts)]
