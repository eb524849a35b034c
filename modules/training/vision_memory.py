"""What the vision side of a model takes of a device's memory: see :mod:`.memory_plan`, which adds it.

Weights are counted to the byte. Activations are an estimate from the widths of a block's layers; a tower that is not
trained keeps none, but needs memory while it runs.

Shapes: P patches of all images of a micro-batch, D width of the tower, I width of its MLP, H of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..lora.config import is_adapter
from ..models.vision_language import QLoRAForVisionLanguage
from ..quantization import NF4Linear

#: (rows, values per row, bytes per value) of a frozen parameter, (rows, values per row) of a trained one.
_Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of a vision side.

    Attributes:
        frozen: Shapes of its frozen parameters.
        trained: Of those that are trained: adapters, and a projector in full.
        statistics: Bytes of 4-bit statistics.
        blocks: Of the tower.
        width: D.
        outputs: What the linear layers of a block give for each patch, in values.
        low: Ranks of a block's adapters, together.
        largest_block: Bytes of the frozen weights of a block, and how many numbers of it are trained.
        hidden_size: H.
        learns: Whether the tower is trained.
        projector_learns: Whether the projector is, in full or by adapters.
    """

    frozen: _Shapes
    trained: _Shapes
    statistics: int
    blocks: int
    width: int
    outputs: int
    low: int
    largest_block: tuple[int, int]
    hidden_size: int
    learns: bool
    projector_learns: bool

    @classmethod
    def of(cls, model: QLoRAForVisionLanguage) -> VisionSizes:
        """Of a model on the meta device."""
        text = {id(p) for p in model.decoder.parameters()} | {id(p) for p in model.lm_head.parameters()}
        parameters = [p for p in model.parameters() if id(p) not in text]
        shapes = [(p.shape[0], p.numel() // max(p.shape[0], 1), p.itemsize, p.requires_grad) for p in parameters]
        of_text = {id(module) for module in model.decoder.modules()}
        blocks = model.vision.blocks(model.model)
        linears = [
            (name, module) for name, module in blocks[0].named_modules()
            if isinstance(module, nn.Linear) and not is_adapter(f"{name}.weight")
        ]  # fmt: skip
        return cls(
            frozen=tuple(shape[:3] for shape in shapes if not shape[3]),
            trained=tuple(shape[:2] for shape in shapes if shape[3]),
            statistics=sum(
                buffer.nbytes for module in model.modules() if isinstance(module, NF4Linear)
                if id(module) not in of_text for buffer in module.buffers()
            ),
            blocks=len(blocks),
            width=min(module.in_features for _, module in linears),
            outputs=sum(module.out_features for _, module in linears),
            low=sum(p.shape[0] for name, p in blocks[0].named_parameters() if ".lora_A." in name),
            largest_block=max(
                (
                    sum(p.nbytes for p in block.parameters() if not p.requires_grad),
                    sum(p.numel() for p in block.parameters() if p.requires_grad),
                )
                for block in blocks
            ),
            hidden_size=int(model.config.get_text_config().hidden_size),
            learns=model.options.vision_lora,
            projector_learns=model.options.projector != "frozen",
        )  # fmt: skip

    def frozen_bytes(self, shards: int) -> int:
        """Of a rank."""
        return sum(-(-rows // shards) * width * size for rows, width, size in self.frozen)

    def trained_values(self, shards: int) -> int:
        """Numbers of a rank that are trained."""
        return sum(-(-rows // shards) * width for rows, width in self.trained)

    def kept_bytes(self, patches: int, value: int, recomputed: bool) -> int:
        """What autograd keeps of P ``patches`` until backward, ``value`` bytes each number."""
        kept = patches * value * (self.width + 2 * self.hidden_size) if self.projector_learns or self.learns else 0
        if self.learns:
            each = patches * value * self.width if recomputed else self._block_bytes(patches, value)
            kept += self.blocks * each
        return kept

    def working_bytes(self, patches: int, value: int) -> int:
        """What a block needs while it runs, or is recomputed and differentiated."""
        return self._block_bytes(patches, value) * (2 if self.learns else 1)

    def _block_bytes(self, patches: int, value: int) -> int:
        """Results of the linear layers, activation and attention, and two norms with their inputs."""
        return patches * (value * (self.outputs + self.low + 4 * self.width) + 2 * 4 * self.width)


def vision_sizes(model: Any) -> VisionSizes | None:
    """:meth:`VisionSizes.of` a vision-language model, ``None`` of another."""
    return VisionSizes.of(model) if isinstance(model, QLoRAForVisionLanguage) else None
