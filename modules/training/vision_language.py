"""The LightningModule of vision-language models: QLoRA finetuning on images and text.

Shapes: B samples, S tokens per sample, images' placeholders included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import nn

from ..lora.adapter_files import read_adapter
from ..lora.config import read_adapter_config
from ..losses.functional import cross_entropy
from ..models.causal_lm import QLoRAForCausalLM
from ..models.families import VISION_FAMILIES, load_config
from ..models.options import ComputeOptions
from ..models.vision_language import QLoRAForVisionLanguage, VisionLanguageHead, VisionOptions
from .causal_lm import QLoRACausalLM

#: What of a batch stays on the host, where it is read: sizes of images.
_ON_THE_HOST = ("image_grid_thw", "image_sizes")


def _check_adapter(adapter: str | Path, head: VisionLanguageHead) -> None:
    """Refuse to continue from an adapter of a language model, or of another trained projector.

    Raises:
        ValueError: Naming what is wrong.
    """
    lora = read_adapter_config(adapter, trained_modules=None)
    in_full = set(lora.modules_to_save or ())
    if in_full != set(head.trained_modules):
        asked = ", ".join(head.trained_modules) or "none"
        raise ValueError(
            f"The adapter in {adapter} holds modules that were trained in full "
            f"({', '.join(sorted(in_full)) or 'none'}), this run trains {asked}. Set --projector as for the adapter."
        )
    side = VISION_FAMILIES[head.model_type].vision
    assert side is not None
    if not any(f".{side.language_model}." in key for key in read_adapter(adapter, lora)):
        raise ValueError(
            f"The adapter in {adapter} was made for a language model alone: it adapts no layer of "
            f"model.{side.language_model}. Continue from an adapter of this vision-language model."
        )


class QLoRAVisionLanguage(QLoRACausalLM):
    """Finetunes LoRA adapters, and if asked the projector, on a vision-language model that is frozen in 4 bits.

    A batch is that of :class:`~lightning_qlora.modules.training.causal_lm.QLoRACausalLM` with the inputs of the
    family's processor beside it, the images of all samples in order: ``pixel_values``, and ``image_grid_thw``,
    ``image_sizes``, ``pixel_attention_mask``, ``mm_token_type_ids`` or ``token_type_ids`` as the family has them. A
    batch without images holds none of these. An ``attention_mask`` [B, S] that only pads on the right is not needed,
    and left out: attention is causal.

    Args (all others are those of :class:`QLoRACausalLM`):
        vision: What is trained beside the language model's adapters; or its fields.

    Raises:
        ValueError: As :class:`QLoRACausalLM`; for a language model without vision.
    """

    def __init__(
        self,
        model_dir: str | Path,
        lora: LoraConfig | dict[str, Any] | None = None,
        *,
        vision: VisionOptions | dict[str, Any] = VisionOptions(),  # noqa: B008  frozen
        loss: Callable[..., Any] = cross_entropy,
        loss_inputs: Sequence[str] = (),
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
        vision = VisionOptions(**vision) if isinstance(vision, dict) else vision
        config = load_config(model_dir, vision=True)
        head = VisionLanguageHead.of(config, vision)
        if init_adapter is not None:
            _check_adapter(init_adapter, head)
        super().__init__(
            model_dir, lora, loss=loss, loss_inputs=loss_inputs, learning_rate=learning_rate,
            warmup_steps=warmup_steps, schedule=schedule, weight_decay=weight_decay, compute=compute, packing=packing,
            compile_backend=compile_backend, head=head, init_adapter=init_adapter, model_name=model_name, seed=seed,
        )  # fmt: skip
        self.vision = vision
        self.save_hyperparameters({"vision": dataclasses.asdict(vision)})
        of_images = {
            "pixel_values",
            *(name for row in VISION_FAMILIES.values() if row.vision for name in row.vision.inputs),
        }
        self._inputs = self.inputs_of(QLoRAForVisionLanguage) - of_images | set(head.inputs)

    def adapt(self, model: QLoRAForCausalLM) -> None:
        """As :meth:`QLoRACausalLM.adapt`.

        Raises:
            ValueError: If the LoRA configuration is of an adapter that leaves out what ``vision`` asks for.
        """
        super().adapt(model)
        assert isinstance(model, QLoRAForVisionLanguage)
        if left_out := model.left_unadapted():
            raise ValueError(
                f"{left_out} to be adapted, but LoRA target_modules {self.lora.target_modules!r} match nothing there. "
                "An adapter to continue from decides what is adapted: ask for the same, or start without it."
            )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Compute on the host what the device would be waited for: positions, and how many tokens are an image's."""
        if not isinstance(batch, dict) or self.model is None or batch["input_ids"].device.type != "cpu":
            return batch
        model = self.model
        assert isinstance(model, QLoRAForVisionLanguage)
        batch = {name: value for name, value in batch.items() if value is not None}
        mask = batch.get("attention_mask")
        if mask is not None and mask.ndim == 2 and bool((mask[:, 1:] <= mask[:, :-1]).all()):
            del batch["attention_mask"]
        if "pixel_values" in batch:
            batch["num_image_tokens"] = int((batch["input_ids"] == model.config.image_token_id).sum())
            if "position_ids" not in batch:
                positions = model.positions(batch["input_ids"], batch, batch.get("attention_mask"))
                if positions is not None:
                    batch["position_ids"] = positions
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """As Lightning's, but sizes of images stay on the host."""
        if not isinstance(batch, dict):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        sizes = {name: batch[name] for name in _ON_THE_HOST if name in batch}
        others = {name: value for name, value in batch.items() if name not in sizes}
        return super().transfer_batch_to_device(others, device, dataloader_idx) | sizes

    def _counted_modules(self) -> list[nn.Module]:
        """Of the language model alone: what the vision tower takes depends on the images."""
        return [*self._model.decoder.modules(), *self._model.get_submodule("lm_head").modules()]
