"""LightningModules and what a run needs around them: optimizer, memory plan, run directory, resuming."""

from typing import TYPE_CHECKING

from ..lazy import import_on_first_use

if TYPE_CHECKING:
    from .causal_lm import QLoRACausalLM
    from .memory_plan import MemoryPlan, plan_memory
    from .optimizer import ShardAdamW
    from .preference import QLoRAPreference
    from .run_directory import RunDirectory
    from .run_plan import RunPlan, plan_run
    from .sequence_classifier import QLoRASequenceClassifier
    from .vision_language import QLoRAVisionLanguage
else:
    __getattr__, __dir__ = import_on_first_use(__name__)

__all__ = [
    "MemoryPlan",
    "QLoRACausalLM",
    "QLoRAPreference",
    "QLoRASequenceClassifier",
    "QLoRAVisionLanguage",
    "RunDirectory",
    "RunPlan",
    "ShardAdamW",
    "plan_memory",
    "plan_run",
]
