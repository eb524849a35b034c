"""The LightningModule of causal language models: QLoRA finetuning on one device or on several, sharded or not.

Shapes: B samples, S tokens per sample, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig
from torch import Tensor

from ..checkpoints.chat_format import ChatFormat
from ..losses.functional import cross_entropy
from ..models.causal_lm import QLoRAForCausalLM
from ..models.options import ComputeOptions
from .base import QLoRAModule
from .generation import generate_answers

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
        lora: LoraConfig | None = None,
        *,
        loss: Callable[..., Any] = cross_entropy,
        loss_inputs: Sequence[str] = (),
        learning_rate: float = 2e-4,
        warmup_steps: int = 0,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        weight_decay: float = 0.0,
        compute: ComputeOptions = ComputeOptions(),  # noqa: B008  frozen
        packing: bool = False,
        compile_backend: str | Callable[..., Any] = "inductor",
        init_adapter: str | Path | None = None,
        model_name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model_dir, lora, learning_rate=learning_rate, warmup_steps=warmup_steps, schedule=schedule,
            weight_decay=weight_decay, compute=compute, packing=packing, compile_backend=compile_backend,
            init_adapter=init_adapter, model_name=model_name, seed=seed,
        )  # fmt: skip
        self.loss, self.loss_inputs = loss, tuple(loss_inputs)
        self._inputs = set(inspect.signature(QLoRAForCausalLM.forward).parameters) - {"self", "kwargs"}

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
        # The loss is computed inside the forward of the module that FSDP2 took as its root: only there are weights
        # gathered.
        output = self._model(
            **inputs, loss_inputs=tuple(batch[name] for name in self.loss_inputs), num_items_in_batch=1,
            num_loss_tokens=tokens,
        )  # fmt: skip
        return output.loss, tokens

    def answer(self, prompt: str, max_new_tokens: int = 64) -> str:
        """Greedy answer to a one-turn chat with ``prompt``. All ranks of a sharded model must call it together."""
        return self.answers([prompt], max_new_tokens)[0]

    def answers(self, prompts: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """:meth:`answer` to each of ``prompts``, all in one batch."""
        training = self.training
        self.eval()
        with self.trainer.precision_plugin.forward_context():
            chat_format = self.chat_format or ChatFormat.of(self.model_dir)
            texts = generate_answers(
                self._model, chat_format, [[{"role": "user", "content": prompt}] for prompt in prompts],
                device=self.device, max_new_tokens=max_new_tokens,
            )  # fmt: skip
        self.train(training)
        return texts
