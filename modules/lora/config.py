"""Which LoRA configurations these modules train, read and merge."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig


def default_lora(
    r: int = 64, alpha: int | None = None, dropout: float = 0.0, targets: Sequence[str] | None = None
) -> LoraConfig:
    """LoRA on ``targets``, or all linear layers but the head, with ``alpha`` = 2 * ``r`` unless given."""
    return LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if targets is None else list(targets),
        task_type="CAUSAL_LM",
    )


def read_adapter_config(
    directory: str | Path,
    remedy: str = "Nothing else is trained here: continue from a plain LoRA adapter.",
    trained_modules: Sequence[str] | None = (),
) -> LoraConfig:
    """The configuration of a plain LoRA adapter in peft's format.

    Args:
        directory: Where it is.
        remedy: What to do about another kind of adapter: the error's last sentence.
        trained_modules: As of :func:`check_plain_lora`; ``None`` allows any, for whoever checks them later.

    Raises:
        ValueError: If there is none, it is damaged, or it is not plain LoRA (see :func:`check_plain_lora`).
    """
    path = Path(directory) / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{directory} holds no LoRA adapter of peft: {path.name} is missing.")
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"The adapter in {directory} is damaged: {path.name}: {error}.") from error
    if trained_modules is None:
        trained_modules = getattr(config, "modules_to_save", None) or ()
    return check_plain_lora(config, f"The adapter in {directory}", remedy, trained_modules)


def adapter_lora(directory: str | Path, dropout: float = 0.0) -> LoraConfig:
    """The configuration with which training goes on from a saved adapter: its rank, alpha, layers and rsLoRA.

    Which of its modules are trained in full is the model's matter, and left as it stands there.

    Args:
        directory: In peft's format.
        dropout: Which an adapter does not keep: that of this run.

    Raises:
        ValueError: As :func:`read_adapter_config`.
    """
    lora = copy.copy(read_adapter_config(directory, trained_modules=None))
    lora.inference_mode, lora.lora_dropout, lora.base_model_name_or_path = False, dropout, None
    lora.init_lora_weights = True  # whatever it started from: its weights replace the initial ones
    return lora


def lora_to_dict(lora: LoraConfig) -> dict[str, Any]:
    """What differs from peft's defaults, in JSON types: ``LoraConfig(**lora_to_dict(lora))`` equals ``lora``."""
    default, values = LoraConfig(), {}
    for option in dataclasses.fields(LoraConfig):
        value = getattr(lora, option.name)
        if option.init and option.name != "peft_version" and value != getattr(default, option.name):
            values[option.name] = sorted(value) if isinstance(value, set) else value
    return values


def with_targets(lora: LoraConfig, projections: Sequence[str]) -> LoraConfig:
    """``lora`` itself if it names layers; if its ``target_modules`` are ``"all-linear"`` or ``None``, a copy that names
    all ``projections``, as the saved adapter does.

    Raises:
        ValueError: If it names a layer that is none of ``projections``; peft would pass over it.
    """
    if lora.target_modules not in (None, "all-linear"):
        names = [] if isinstance(lora.target_modules, str) else sorted(lora.target_modules or ())
        if unknown := [name for name in names if name.rpartition(".")[2] not in projections]:
            raise ValueError(
                f"LoRA target_modules (--lora_targets) name {unknown[0]!r}, which is no projection of a decoder layer. "
                f"Choose from {', '.join(projections)}."
            )
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
        lora_r: Rank of the adapters. Default: that of init_adapter, or 64.
        lora_alpha: Adapter updates are scaled by lora_alpha / lora_r. Default: that of init_adapter, or 2 * lora_r.
        lora_dropout: Probability of dropping an element of an adapter's input.
        lora_targets: Linear layers to adapt, as in q_proj,v_proj. Default: those of init_adapter, or all of each
            decoder layer.
        init_adapter: Directory of a peft adapter to continue from. Rank, alpha, layers and rsLoRA are the adapter's.

    Raises:
        ValueError: For a rank below 1, a non-positive alpha, a dropout outside [0, 1), or values that are not those of
            ``init_adapter``.
    """

    lora_r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    lora_targets: list[str] | str | None = None
    init_adapter: Path | None = None

    def __post_init__(self) -> None:
        check_lora(self.config())

    def config(self) -> LoraConfig:
        """The adapters' configuration in peft's own form.

        Raises:
            ValueError: If ``init_adapter`` is no plain LoRA adapter, or has other values than these.
        """
        targets = self.lora_targets
        if isinstance(targets, str):
            targets = [name.strip() for name in targets.split(",") if name.strip()]
        if targets is not None and not targets:
            raise ValueError("--lora_targets names no layer. Leave it out to adapt all of them.")
        if self.init_adapter is None:
            return default_lora(64 if self.lora_r is None else self.lora_r, self.lora_alpha, self.lora_dropout, targets)
        lora = adapter_lora(self.init_adapter, self.lora_dropout)
        theirs = lora.target_modules
        for flag, mine, of_adapter in (
            ("lora_r", self.lora_r, lora.r),
            ("lora_alpha", self.lora_alpha, lora.lora_alpha),
            ("lora_targets", targets and sorted(targets), theirs if isinstance(theirs, str) else sorted(theirs or ())),
        ):
            if mine is not None and mine != of_adapter:
                raise ValueError(
                    f"--{flag} is {mine}, but the adapter in {self.init_adapter} has {of_adapter}. Leave --{flag} out: "
                    "training goes on with the adapter's."
                )
        return lora


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
