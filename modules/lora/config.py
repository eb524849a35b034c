"""Which LoRA configurations these modules train, read and merge."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftConfig


def default_lora(r: int = 64, alpha: int | None = None, dropout: float = 0.0) -> LoraConfig:
    """LoRA on all linear layers but the head, with ``alpha`` = 2 * ``r`` unless given."""
    return LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def with_targets(lora: LoraConfig, projections: Sequence[str]) -> LoraConfig:
    """``lora`` itself if it names layers; if its ``target_modules`` are ``"all-linear"`` or ``None``, a copy that names
    all ``projections``, as the saved adapter does.
    """
    if lora.target_modules not in (None, "all-linear"):
        return lora
    lora = copy.copy(lora)
    lora.target_modules = list(projections)
    return lora


def with_head(lora: LoraConfig, trained_modules: Sequence[str], task_type: str | None) -> LoraConfig:
    """``lora`` itself for a frozen head; else a copy that names what is trained in full beside the adapters.

    Args:
        lora: The adapters.
        trained_modules: Names of the modules that are trained in full.
        task_type: peft's name of the task.
    """
    if not trained_modules:
        return lora
    lora = copy.copy(lora)
    lora.task_type, lora.modules_to_save = task_type, list(trained_modules)
    return lora


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is a LoRA matrix."""
    return ".lora_A." in name or ".lora_B." in name


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """LoRA adapters.

    Args:
        lora_r: Rank of the adapters, which are added to all linear layers of each decoder layer.
        lora_alpha: Adapter updates are scaled by lora_alpha / lora_r. null means 2 * lora_r.
        lora_dropout: Probability of dropping an element of an adapter's input.
        init_adapter: Directory of a peft adapter with the same rank and alpha, to continue from.

    Raises:
        ValueError: For a rank below 1, a non-positive alpha, or a dropout outside [0, 1).
    """

    lora_r: int = 64
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    init_adapter: Path | None = None

    def __post_init__(self) -> None:
        check_lora(self.config())

    def config(self) -> LoraConfig:
        """The adapters' configuration in peft's own form."""
        return default_lora(self.lora_r, self.lora_alpha, self.lora_dropout)


def check_lora(lora: LoraConfig, trained_modules: Sequence[str] = ()) -> LoraConfig:
    """Return ``lora`` if these modules can train it.

    Args:
        lora: Any.
        trained_modules: As of :func:`check_plain_lora`.

    Raises:
        ValueError: For a rank below 1, a non-positive alpha, a dropout outside [0, 1), another initialisation than
            peft's default, or a variant of LoRA (see
            :func:`~lightning_qlora.modules.lora.config.check_plain_lora`).
    """
    if lora.r < 1:
        raise ValueError(f"LoRA rank r must be at least 1, got {lora.r}.")
    if not lora.lora_alpha > 0:
        raise ValueError(f"lora_alpha must be positive, got {lora.lora_alpha}.")
    if not 0 <= lora.lora_dropout < 1:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora.lora_dropout}.")
    if lora.init_lora_weights is not True:
        raise ValueError(
            f"The LoraConfig has init_lora_weights={lora.init_lora_weights!r}, but adapters start here as peft's "
            "default does, equal for any number of ranks. Leave it True; to start otherwise, load an adapter that peft "
            "initialised (init_adapter)."
        )
    remedy = "Nothing else is trained here: leave it at its default."
    return check_plain_lora(lora, "The LoraConfig", remedy, trained_modules)


#: Options of ``LoraConfig`` under which an adapted weight is ``W + scaling * B @ A``. Of all others, those of future
#: versions of peft included, only the default is accepted.
_PLAIN = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "runtime_config", "megatron_core",
    # Details of what other options switch on.
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip

#: Initialisations that leave the base as it is; the others (PiSSA, OLoRA, LoftQ...) subtract something from it.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


#: Heads by which peft knows a classifier: it puts both into ``modules_to_save``, whichever the model has.
_HEADS_OF_PEFT = {"classifier", "score"}


def check_plain_lora(config: PeftConfig, source: str, remedy: str, trained_modules: Sequence[str] = ()) -> LoraConfig:
    """Return ``config`` if it is plain LoRA: ``W + scaling * B @ A`` with the base's own W.

    Args:
        config: Any configuration of peft.
        source: Where it comes from, as the subject of an error's sentence.
        remedy: What to do about a variant of LoRA: the error's last sentence.
        trained_modules: Modules of the model that are trained in full, which may stand in ``modules_to_save``.

    Raises:
        ValueError: For another type of adapter, for variants of LoRA (DoRA, aLoRA, QALoRA, trained biases or tokens,
            other ``modules_to_save``, ...), and for an initialisation that changed the base.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{source} is a {config.peft_type} adapter. Only LoRA adapters are supported here.")
    heads = {*trained_modules, *_HEADS_OF_PEFT} if trained_modules else set()
    default = LoraConfig()
    for option in dataclasses.fields(LoraConfig):
        value = getattr(config, option.name)
        if option.name == "modules_to_save" and set(value or ()) <= heads:
            continue
        # What is None, False or empty switches nothing on.
        if option.name not in _PLAIN and value and value != getattr(default, option.name):
            raise ValueError(
                f"{source} has {option.name}={value!r}, which is more than a product B @ A added to a frozen weight. "
                f"{remedy}"
            )
    if config.init_lora_weights not in _INITIALISATIONS:
        raise ValueError(
            f"{source} has init_lora_weights={config.init_lora_weights!r}, which changed the base that it was trained "
            "on. Convert it with peft (path_initial_model_for_weight_conversion) first."
        )
    return config
