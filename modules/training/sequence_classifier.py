"""The LightningModule of sequence classification and regression: QLoRA with a head over the last token of each text.

Shapes: B rows, S tokens per row, N texts (B, or more in packed rows), C classes, labels or numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..distributed.collectives import gather_objects
from ..distributed.trained_checkpoints import read_checkpoint
from ..models.options import ComputeOptions
from ..models.sequence_classifier import ClassificationHead
from ..options import ProblemType
from .base import CHECKPOINT_KEY, QLoRAModule
from .classification_metrics import ClassificationMetrics, classification_metrics

#: Beside a saved adapter: the ``labels`` in the order of the head's outputs, ``problem_type`` and ``pad_token_id``.
CLASSIFICATION_FILE = "classification.json"

#: What a batch holds that the model does not take.
_NOT_OF_THE_MODEL = ("labels", "index", "num_tokens", "num_examples")


class QLoRASequenceClassifier(QLoRAModule):
    """Finetunes adapters and a head over the last token of each text, on a language model that is frozen in 4 bits.

    A batch is a dict with ``input_ids``, int64 [B, S], padded on the right; ``last_tokens``, int64 [N], the place of
    each text's last token among all B * S; and ``labels``: int64 [N] for single labels, float32 [N, C] for several, and
    for regression. Rows without a text of their own (padding of the last batch) have no entry in ``last_tokens``. A
    batch of packed rows also has ``position_ids`` and ``document_lengths``, as for
    :class:`~lightning_qlora.modules.training.causal_lm.QLoRACausalLM`. Instead of ``last_tokens`` there may be an
    ``attention_mask`` [B, S], with padding on either side.

    The loss of a step is the mean over all its texts of the cross-entropy; of several labels, of the mean binary
    cross-entropy over the labels; of numbers, of the mean squared error.

    Logged after each validation, beside ``val_loss``: the ``figures`` of
    :class:`~lightning_qlora.modules.training.classification_metrics.ClassificationMetrics` as ``val_accuracy`` and so
    on. They are computed from the logits of all ranks at once, so they are exact.

    Args (all others are those of :class:`QLoRAModule`):
        labels: Names of the C classes, in the order of the head's outputs; for regression of the numbers.
        problem_type: What a text is given.
        class_weights: For single labels, what the loss of a text of each class is multiplied by; the sum is still
            divided by the number of texts, so weights should average 1 over the data. For several labels, what the
            loss of a label that is there is multiplied by (``pos_weight``).
        tokenizer: Saved with the adapter, with the token that batches are padded with: transformers' classes find the
            end of a text by it.

    Raises:
        ValueError: As :class:`QLoRAModule`; for fewer than two classes, names that occur twice, or weights that are not
            C positive numbers, or are given for regression.
    """

    def __init__(
        self,
        model_dir: str | Path,
        lora: LoraConfig | dict[str, Any] | None = None,
        *,
        labels: Sequence[str],
        problem_type: ProblemType = "single_label_classification",
        class_weights: Sequence[float] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        learning_rate: float = 2e-4,
        warmup_steps: int = 0,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        weight_decay: float = 0.0,
        compute: ComputeOptions | dict[str, Any] = ComputeOptions(),  # noqa: B008  frozen
        packing: bool = False,
        compile_backend: str | Callable[..., Any] = "inductor",
        init_adapter: str | Path | None = None,
        model_name: str | None = None,
        seed: int = 0,
    ) -> None:
        self._check(labels, problem_type, class_weights)
        super().__init__(
            model_dir, lora, learning_rate=learning_rate, warmup_steps=warmup_steps, schedule=schedule,
            weight_decay=weight_decay, compute=compute, packing=packing, compile_backend=compile_backend,
            head=ClassificationHead(len(labels)), init_adapter=init_adapter, model_name=model_name, seed=seed,
        )  # fmt: skip
        self.labels, self.problem_type, self.tokenizer = tuple(labels), problem_type, tokenizer
        weights_list = None if class_weights is None else [float(weight) for weight in class_weights]
        self.save_hyperparameters({"labels": list(labels), "problem_type": problem_type, "class_weights": weights_list})
        self.class_weights: Tensor | None
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self.metrics: ClassificationMetrics | None = None
        """Figures of the last validation, equal on all ranks."""
        self._outputs: list[tuple[Tensor, Tensor]] = []
        self._predicted: list[tuple[Tensor, Tensor]] = []
        if init_adapter is not None:
            self._check_labels_of(Path(init_adapter))

    @staticmethod
    def _check(labels: Sequence[str], problem_type: str, weights: Sequence[float] | None) -> None:
        if problem_type not in get_args(ProblemType):
            raise ValueError(
                f"problem_type must be one of {', '.join(map(repr, get_args(ProblemType)))}, got {problem_type!r}."
            )
        if isinstance(labels, str) or len(set(labels)) != len(labels):
            raise ValueError(f"labels must be a list of names that differ, got {labels!r}.")
        least = 2 if problem_type == "single_label_classification" else 1
        if len(labels) < least:
            raise ValueError(f"{problem_type} needs at least {least} labels, got {list(labels)}.")
        if weights is None:
            return
        if problem_type == "regression":
            raise ValueError("class_weights weigh classes, which a regression does not have. Leave them out.")
        if len(weights) != len(labels) or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(
                f"class_weights must be {len(labels)} positive numbers, one for each of {', '.join(labels)}; got "
                f"{list(weights)}."
            )

    def _check_labels_of(self, adapter: Path) -> None:
        """Refuse to continue from a head whose outputs mean something else."""
        if not (adapter / CLASSIFICATION_FILE).is_file():
            return  # written by peft, which does not know
        described = json.loads((adapter / CLASSIFICATION_FILE).read_text(encoding="utf-8"))
        if (described["labels"], described["problem_type"]) != ([*self.labels], self.problem_type):
            raise ValueError(
                f"The adapter in {adapter} was trained for {described['problem_type']} with the labels "
                f"{', '.join(described['labels'])}; this run is for {self.problem_type} with "
                f"{', '.join(self.labels)}. Use the same labels in the same order, or start without --init_adapter."
            )

    # --- training ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits [N, C], float32, of a batch."""
        inputs = {name: value for name, value in batch.items() if name not in _NOT_OF_THE_MODEL}
        return self._model(**inputs).logits  # type: ignore[no-any-return]

    def loss_sum(self, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """The loss of a batch, summed over its texts (float32, 0-dim), and how many these are.

        Raises:
            ValueError: If the batch has no labels, or not one for each text.
        """
        return self._loss(self(batch), batch)

    def _loss(self, logits: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        if "labels" not in batch:
            raise ValueError(f"The batch lacks labels; it holds {', '.join(sorted(batch))}.")
        labels = batch["labels"]
        expected = logits.shape[:1] if self.problem_type == "single_label_classification" else logits.shape
        if labels.shape != expected:
            raise ValueError(
                f"The labels of a batch have the shape {tuple(labels.shape)}, but its {len(logits)} texts need "
                f"{tuple(expected)} for {self.problem_type} with {len(self.labels)} labels."
            )
        if self.problem_type == "single_label_classification":
            loss = F.cross_entropy(logits, labels, weight=self.class_weights, reduction="sum")
        elif self.problem_type == "multi_label_classification":
            loss = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=self.class_weights, reduction="sum")
            loss = loss / len(self.labels)
        else:
            loss = F.mse_loss(logits, labels, reduction="sum") / len(self.labels)
        return loss, len(logits)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget batches of a validation that was interrupted."""
        super().on_validation_epoch_start()
        self._outputs.clear()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Collect the batch's loss, logits and labels."""
        logits = self(batch)
        self._val.append(self._loss(logits, batch))
        self._outputs.append((logits.detach(), batch["labels"]))

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss and the figures over all texts of all ranks."""
        super().on_validation_epoch_end()
        logits, labels = _gather(self._outputs)
        if not len(logits):
            return
        self.metrics = classification_metrics(logits, labels, self.problem_type, self.labels)
        for name, value in self.metrics.figures.items():
            self.log(f"val_{name}", value, sync_dist=True)  # equal on all ranks already

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [N, C] as probabilities [N, C]; for regression the numbers themselves."""
        if self.problem_type == "single_label_classification":
            return logits.softmax(-1)
        return logits.sigmoid() if self.problem_type == "multi_label_classification" else logits

    def on_predict_epoch_start(self) -> None:
        """Forget predictions of an earlier call."""
        self._predicted.clear()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Probabilities [N, C], float32, of a batch."""
        probabilities = self.probabilities(self(batch)).detach()
        if "index" in batch:
            self._predicted.append((probabilities, batch["index"]))
        return probabilities

    def predictions(self) -> list[dict[str, Any]]:
        """What ``Trainer.predict`` found for the texts of all ranks, in the order of the data; all ranks must call it.

        Each is ``{"label": ..., "probabilities": {name: ...}}``; ``"labels"`` with those of at least 0.5 for several;
        ``"values": {name: ...}`` for regression. Batches need an ``index`` [N], the place of each text in the data.
        """
        probabilities, index = _gather(self._predicted)
        found: list[dict[str, Any]] = []
        for row in probabilities[index.argsort()].tolist():
            named = dict(zip(self.labels, row, strict=True))
            if self.problem_type == "regression":
                found.append({"values": named})
            elif self.problem_type == "multi_label_classification":
                chosen = [name for name, value in named.items() if value >= 0.5]
                found.append({"labels": chosen, "probabilities": named})
            else:
                found.append({"label": max(named, key=lambda name: named[name]), "probabilities": named})
        return found

    # --- in and out --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As :meth:`QLoRAModule.on_save_checkpoint`, with what the head's outputs mean."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY] |= {"labels": list(self.labels), "problem_type": self.problem_type}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse also a checkpoint whose head was trained for other labels.

        Raises:
            ValueError: Naming what differs or is missing.
        """
        super().on_load_checkpoint(checkpoint)
        self._check_meaning(checkpoint[CHECKPOINT_KEY])

    def check_checkpoint(self, path: str | Path | None) -> None:
        """As :meth:`QLoRAModule.check_checkpoint`, and that the head was trained for the same labels.

        Raises:
            ValueError: Naming what differs.
        """
        super().check_checkpoint(path)
        if path is not None:
            self._check_meaning(read_checkpoint(path)[CHECKPOINT_KEY])

    def _check_meaning(self, saved: Mapping[str, Any]) -> None:
        theirs = (saved.get("problem_type"), saved.get("labels"))
        if theirs != (self.problem_type, [*self.labels]):
            raise ValueError(
                f"The checkpoint was made for {theirs[0]} with the labels {theirs[1]}, this run is for "
                f"{self.problem_type} with {[*self.labels]}. Resume with the same data, or start in a new --output_dir."
            )

    def save_adapter(self, directory: str | Path) -> None:
        """Write adapters and head as stock peft does for ``SEQ_CLS``, and what they mean. All ranks must call it.

        Stock transformers and peft read it so, with the saved tokenizer if texts are more than one::

            described = json.loads((directory / "classification.json").read_text())
            described["id2label"] = dict(enumerate(described.pop("labels")))
            base = AutoModelForSequenceClassification.from_pretrained(base_name, **described)
            model = PeftModel.from_pretrained(base, directory)
        """
        super().save_adapter(directory)
        if self.global_rank:
            return
        directory = Path(directory)
        described: dict[str, Any] = {"labels": list(self.labels), "problem_type": self.problem_type}
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
            described["pad_token_id"] = self.tokenizer.pad_token_id
        text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
        (directory / CLASSIFICATION_FILE).write_text(text, encoding="utf-8")


def _gather(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The tensors of all batches and ranks on the CPU, one after another; ``parts`` are empty then."""
    mine = [(first.cpu(), second.cpu()) for first, second in parts]
    parts.clear()
    everyone = [pair for pairs in gather_objects(mine) for pair in pairs]
    if not everyone:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
    return torch.cat([first for first, _ in everyone]), torch.cat([second for _, second in everyone])
