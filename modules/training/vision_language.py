"""The LightningModule of vision-language models: QLoRA finetuning on images and text.

Shapes: B samples, S tokens per sample, images' placeholders included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import nn

from ..losses.functional import cross_entropy
from ..models.families import load_config
from ..models.options import ComputeOptions
from ..models.vision_language import QLoRAForVisionLanguage, VisionLanguageHead, VisionOptions
from .causal_lm import QLoRACausalLM

#: What of a batch stays on the host, where it is read: sizes of images.
_ON_THE_HOST = ("image_grid_thw", "image_sizes")


class QLoRAVisionLanguage(QLoRACausalLM):
    """Finetunes LoRA adapters, and if asked the projector, on a vision-language model that is frozen in 4 bits.

    A batch is that of :class:`~lightning_qlora.modules.training.causal_lm.QLoRACausalLM` with the inputs of the
    family's processor beside it, the images of all samples in order: ``pixel_values``, and ``image_grid_thw``,
    ``image_sizes``, ``pixel_attention_mask``, ``mm_token_type_ids`` or ``token_type_ids`` as the family has them. A
    batch without images holds none of these. An ``attention_mask`` [B, S] that only pads on the right is not needed,
    and left out: attention is causal.

    Args (all others are those of :class:`QLoRACausalLM`):
        vision: What is trained beside the language model's adapters.

    Raises:
        ValueError: As :class:`QLoRACausalLM`; for a language model without vision.
    """

    def __init__(
        self,
        model_dir: str | Path,
        lora: LoraConfig | None = None,
        *,
        vision: VisionOptions = VisionOptions(),  # noqa: B008  frozen
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
        config = load_config(model_dir, vision=True)
        head = VisionLanguageHead.of(config, vision)
        super().__init__(
            model_dir, lora, loss=loss, loss_inputs=loss_inputs, learning_rate=learning_rate,
            warmup_steps=warmup_steps, schedule=schedule, weight_decay=weight_decay, compute=compute, packing=packing,
            compile_backend=compile_backend, head=head, init_adapter=init_adapter, model_name=model_name, seed=seed,
        )  # fmt: skip
        self.vision = vision
        self._inputs = self.inputs_of(QLoRAForVisionLanguage) - {"images"} | set(head.inputs)

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
