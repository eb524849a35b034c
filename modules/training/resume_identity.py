"""What a training checkpoint must share with the run that resumes from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..checkpoints.safetensors_files import SafetensorsCheckpoint
from ..models.families import load_config

#: What older checkpoints do not hold.
_LATER_IN_IDENTITY = {"lora_use_rslora", "lora_rank_pattern", "lora_alpha_pattern", "trained_modules"}


@dataclasses.dataclass(frozen=True)
class BaseIdentity:
    """What a training checkpoint must share with the model it is loaded into."""

    fingerprint: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    lora_r: int
    lora_alpha: float
    lora_targets: tuple[str, ...]
    lora_use_rslora: bool
    lora_rank_pattern: tuple[tuple[str, int], ...]  # in order: the first that matches a layer's name counts
    lora_alpha_pattern: tuple[tuple[str, float], ...]
    trained_modules: tuple[str, ...]  # in full, beside the adapters

    @classmethod
    def of(cls, checkpoint: SafetensorsCheckpoint, lora: LoraConfig) -> BaseIdentity:
        """The identity of a base model together with its adapters' shape."""
        config = load_config(checkpoint.directory, vision=None).get_text_config()
        targets = lora.target_modules or ()
        return cls(
            checkpoint.fingerprint(), config.hidden_size, config.num_hidden_layers, config.vocab_size, lora.r,
            float(lora.lora_alpha), (targets,) if isinstance(targets, str) else tuple(sorted(targets)), lora.use_rslora,
            tuple((lora.rank_pattern or {}).items()), tuple((lora.alpha_pattern or {}).items()),
            tuple(lora.modules_to_save or ()),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a checkpoint."""
        return {
            **dataclasses.asdict(self),
            "lora_targets": list(self.lora_targets),
            "trained_modules": list(self.trained_modules),
            "lora_rank_pattern": [list(pair) for pair in self.lora_rank_pattern],
            "lora_alpha_pattern": [list(pair) for pair in self.lora_alpha_pattern],
        }

    def check(self, other: dict[str, Any], source: str | Path) -> None:
        """Refuse a checkpoint made for something else.

        Raises:
            ValueError: Naming each attribute that differs.
        """
        mine = self.to_dict()
        for key in _LATER_IN_IDENTITY - other.keys():
            del mine[key]  # that checkpoint cannot say
        differing = [
            f"{key} is {other.get(key)!r} there and {mine[key]!r} here" for key in mine if other.get(key) != mine[key]
        ]
        if differing:
            raise ValueError(
                f"{source} was made with another model or LoRA shape: {'; '.join(differing)}. Resume with the same "
                "--model and LoRA settings (--lora_r, --lora_alpha), or start in a new --output_dir."
            )
