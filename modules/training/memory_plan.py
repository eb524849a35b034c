"""Predicting, from a model's configuration alone, the memory that QLoRA training takes on each device.

The figures are what PyTorch's allocator hands out (``torch.cuda.max_memory_allocated``) at three moments of a step, of
which the largest is the peak:

* *loss*: the forward is done, its activations are kept, and the loss works through a chunk of logits;
* *backward*: one decoder layer is differentiated (with activation checkpointing: recomputed first);
* *step*: the optimizer's update, when nothing of the forward is left.

What autograd keeps of a decoder layer, eager, in bytes for each token (c bytes a value in the compute dtype); how many
norms and how wide the projections are says the model's structure:

=====================  =======================  =====================================================================
norms                  4 W + 4 each             the input in float32 and the root of its mean square; W is H, Q or K
attention              c (2 Q + 2 K) + 4 heads  queries, keys, values, the result, and a float32 log-sum a head;
                                                keys and values as wide as queries where they are repeated for them
MLP                    3 c I                    gate, silu(gate), up
LoRA, each projection  c R                      A x
LoRA, together         c (2 H + I)              x: the norms' results and the MLP's product; the attention's is there
with dropout instead   c W + W, on a CPU 2 c W  x [T, W] of each projection after dropout, and what was dropped
=====================  =======================  =====================================================================

Mixed precision also keeps the compute-dtype copies of A and B. While it runs, a layer needs more: see
``_working_bytes``. A compiled layer that is not checkpointed keeps less, because it computes elementwise results again:
``_kept_compiled``. ``checkpoint_activations="auto"`` takes the fewest recomputed layers that fit the device.

Shapes: B samples a device, S tokens a sample, T = B S, H hidden size, I intermediate size, Q and K widths of queries
and of keys, R LoRA rank, V vocabulary. A *rank* is a process with its device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..attention.backend import FLASH_CAPABILITY
from ..attention.sdpa import SDPA_REPEATED_KV, sdpa_backend
from ..distributed.strategies import StrategyOptions
from ..hardware import Capabilities, Precision, check_precision, compute_dtype
from ..lora.config import is_adapter
from ..losses.chunked import EAGER_BYTES_PER_LOGIT, auto_chunk_tokens
from ..models.activation_offload import check_offload
from ..models.build import build_structure
from ..models.causal_lm import LanguageModelHead, QLoRAForCausalLM
from ..models.decoder import Head
from ..models.decoder_layer import CheckpointChoice, recomputed_layers
from ..models.families import attention_softcap, head_dim
from ..models.options import ComputeOptions
from ..quantization import NF4Linear
from .vision_memory import VisionSizes, vision_sizes

GIB = 2**30

#: What a process takes beside PyTorch's allocator: the CUDA context with its kernels (on a CPU the interpreter and its
#: libraries are of that size), and NCCL's buffers.
CONTEXT_BYTES, NCCL_BYTES = 512 * 2**20, 256 * 2**20


def bytes_outside_allocator(world_size: int) -> int:
    """What a process of ``world_size`` takes of its device beside PyTorch's allocator."""
    return CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0)


#: What lies unused between the allocator's blocks: a share of its memory, but at least so many bytes.
FRAGMENTATION, LEAST_FRAGMENTATION_BYTES = 0.05, 128 * 2**20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the memory of a training run depends on.

    Attributes:
        config: The base, of any family; all its projections are taken to be 4-bit, in blocks of 64, doubly quantized.
        lora: The adapters.
        batch_size: Samples of a micro-batch on a rank; documents, two per pair, where preferences are trained. The pass
            without gradient of a reference comes before, keeps nothing, and takes less.
        seq_len: Tokens a sample, padding included.
        world_size: Number of ranks.
        strategy: As of ``build_strategy``.
        precision: Of the Trainer.
        offload: FSDP2 keeps parameters, gradients and optimizer state on the host.
        checkpoint_activations: How many decoder layers are recomputed in backward, the first ones; ``True`` for all.
            ``"auto"``: as few as fit into ``limit_bytes``, or none without a limit; :func:`plan_memory` finds how many.
        offload_activations: What they are recomputed from waits on the host.
        limit_bytes: What a process may take of its device.
        head: What the model computes from hidden states.
        image_patches: Of all images of a micro-batch on a rank, for a vision-language model.
        compile: Whether decoder layers are compiled.
        accumulate: Micro-batches a step; above 1 gradients are there all the time, unsharded until the last.
        reshard_after_forward: FSDP2 frees gathered layers between forward and backward.
        prefetch: Layers that FSDP2 gathers ahead; 0 leaves it to FSDP2, which gathers one.
        shard_size: Ranks that one copy is sharded over (hybrid sharding); ``None`` for all.
        model: Sizes of the model's parts, from its structure; made from ``config`` and ``lora``.
        compute_capability: Of the GPU; ``None`` for a CPU. The attention is what ``sdpa_backend`` says for it, on whole
            rows: packed rows or a window take more on SDPA, see :mod:`~lightning_qlora.modules.attention.documents`.

    Raises:
        ValueError: If a count is below 1, or activations are to be offloaded that are not checkpointed.
    """

    config: PretrainedConfig
    lora: LoraConfig
    batch_size: int
    seq_len: int
    world_size: int = 1
    strategy: Literal["fsdp2", "ddp", "single"] = "fsdp2"
    precision: Precision = "16-mixed"
    offload: bool = False
    checkpoint_activations: CheckpointChoice = False
    offload_activations: bool = False
    compile: bool = False
    accumulate: int = 1
    reshard_after_forward: bool = True
    prefetch: int = 0
    shard_size: int | None = None
    compute_capability: tuple[int, int] | None = None
    limit_bytes: int | None = None
    head: Head = LanguageModelHead()  # noqa: RUF009  frozen
    image_patches: int = 0
    model: _Model = field(default=None, repr=False, compare=False)  # type: ignore[assignment]

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        lora: LoraConfig,
        strategy: StrategyOptions,
        compute: ComputeOptions,
        *,
        batch_size: int,
        seq_len: int,
        accumulate: int = 1,
        device: Capabilities | None = None,
        head: Head = LanguageModelHead(),  # noqa: B008  frozen
        image_patches: int = 0,
    ) -> Settings:
        """From the groups of flags; a precision of ``"auto"`` is this machine's. ``device`` is ``None`` for a CPU."""
        device = device if device is not None and device.device_type == "cuda" else None
        limit = None if compute.memory_limit_gib is None else int(compute.memory_limit_gib * GIB)
        if device is not None:
            limit = min(device.memory_bytes, limit or device.memory_bytes)
        return cls(
            config=config, lora=lora, batch_size=batch_size, seq_len=seq_len, accumulate=accumulate,
            world_size=strategy.world_size, strategy=strategy.strategy,  # type: ignore[arg-type]  # checked there
            precision=check_precision(strategy.precision),
            offload=strategy.offload, reshard_after_forward=strategy.reshard_after_forward, prefetch=strategy.prefetch,
            shard_size=strategy.shard_size, checkpoint_activations=compute.checkpoint_activations,
            offload_activations=compute.offload_activations, compile=compute.compile != "off",
            compute_capability=None if device is None else device.compute_capability, limit_bytes=limit,
            head=head, image_patches=image_patches,
        )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "world_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_offload(checkpoint_activations=self.checkpoint_activations, offload_activations=self.offload_activations)
        if self.model is None:  # else it is of settings that differ in something else
            object.__setattr__(
                self, "model", _Model.of(self.config, self.lora, compute_dtype(self.precision), self.head)
            )
        recomputed = recomputed_layers(self.checkpoint_activations, len(self.model.layers))
        object.__setattr__(self, "checkpoint_activations", recomputed)

    @property
    def text(self) -> PretrainedConfig:
        """The configuration of the language model."""
        return self.config.get_text_config()

    @property
    def recomputed(self) -> int:
        """How many decoder layers are recomputed, where that is known."""
        assert isinstance(self.checkpoint_activations, int)
        return self.checkpoint_activations

    @property
    def flex(self) -> bool:
        """Whether attention with soft caps is flex attention, which holds no scores."""
        return self.compute_capability is not None and self.compute_capability >= FLASH_CAPABILITY

    @property
    def shards(self) -> int:
        """Over how many ranks each parameter is split."""
        return 1 if self.strategy != "fsdp2" else self.shard_size or self.world_size

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 gathers parameters before use."""
        return self.strategy == "fsdp2" and (self.world_size > 1 or self.offload)


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes on the device of one rank (of the first, which holds most).

    Attributes:
        settings: What it holds for.
        moments: Name of a moment -> part -> bytes.
        host_bytes: What the rank keeps in host memory instead (``offload``, ``offload_activations``).
    """

    settings: Settings
    moments: dict[str, dict[str, int]]
    host_bytes: int

    @property
    def peak(self) -> str:
        """The moment that takes most."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def checkpointing(self) -> str:
        """Which layers are recomputed, as a sentence."""
        layers, recomputed = len(self.settings.model.layers), self.settings.recomputed
        which = "no decoder layer is" if not recomputed else f"{recomputed} of {layers} decoder layers are"
        of = "" if self.settings.limit_bytes is None else f" of {self.settings.limit_bytes / GIB:.2f} GiB"
        return (
            f"Activation checkpointing: {which} recomputed in backward. Predicted memory of each device: "
            f"{self.device_bytes / GIB:.2f}{of}."
        )

    @property
    def parts(self) -> dict[str, int]:
        """Part -> bytes at the peak."""
        return self.moments[self.peak]

    @property
    def total_bytes(self) -> int:
        """The peak, to compare with ``torch.cuda.max_memory_allocated()``."""
        return sum(self.parts.values())

    @property
    def device_bytes(self) -> int:
        """What the device must have: the peak, what lies unused in the allocator, and what is outside of it."""
        gaps = max(int(self.total_bytes * FRAGMENTATION), LEAST_FRAGMENTATION_BYTES)
        return self.total_bytes + gaps + bytes_outside_allocator(self.settings.world_size)

    def table(self) -> str:
        """Parts by moments in GiB, the peak marked."""
        names = list(dict.fromkeys(part for parts in self.moments.values() for part in parts))
        width = max(map(len, names)) + 2
        head = "".join(f"{moment + ('*' if moment == self.peak else ''):>11}" for moment in self.moments)
        lines = [f"{'GiB on each device':{width}}{head}"]
        for name in names:
            cells = (parts.get(name, 0) / GIB for parts in self.moments.values())
            lines.append(f"{name:{width}}" + "".join(f"{cell:11.3f}" if cell else f"{'-':>11}" for cell in cells))
        totals = (sum(parts.values()) / GIB for parts in self.moments.values())
        lines.append(f"{'total':{width}}" + "".join(f"{total:11.3f}" for total in totals))
        lines.append(f"* the peak. With the CUDA context and the allocator's gaps: {self.device_bytes / GIB:.2f} GiB.")
        if self.host_bytes:
            lines.append(f"In host memory of each process: {self.host_bytes / GIB:.2f} GiB.")
        return "\n".join(lines)

    def check(self, device_bytes: int | None = None) -> str | None:
        """``None`` if this fits a device of that memory, else a message that says so and which flags would fit.

        Without ``device_bytes`` the limit is the settings'; without either everything fits.
        """
        device_bytes = self.settings.limit_bytes if device_bytes is None else device_bytes
        if device_bytes is None or self.device_bytes <= device_bytes:
            return None
        fitting = self.fitting_flags(device_bytes)
        remedy = (
            "These would fit: " + "; ".join(fitting) + "."
            if fitting
            else "No combination of --checkpoint_activations, --offload_activations, --offload, a smaller "
            "--batch_size and --seq_len would fit: take a smaller model."
        )
        return (
            f"Training needs about {self.device_bytes / GIB:.1f} GiB on each device, which has "
            f"{device_bytes / GIB:.1f} GiB. {remedy}"
        )

    def fitting_flags(self, device_bytes: int) -> list[str]:
        """Changes that make it fit, each enough by itself; if there are none, with checkpointing, then offload too.

        Checkpoints move to the host only where recomputing alone is not enough.
        """
        s = self.settings
        halves = [2**i for i in range(1, 20)]
        axes: list[list[dict[str, Any]]] = [
            [{"batch_size": s.batch_size // d} for d in halves if d <= s.batch_size],
            [{"seq_len": s.seq_len // d} for d in halves if s.seq_len // d >= 256],
        ]
        if s.strategy == "fsdp2" and s.shard_size is None:
            axes.append([{"world_size": s.world_size * d} for d in (2, 4, 8)])
        if s.strategy == "ddp":
            axes.append([{"strategy": "fsdp2"}])
        steps: list[dict[str, Any]] = [{}]
        recompute = {"checkpoint_activations": True}
        fewer_activations = [] if s.recomputed == len(s.model.layers) else [recompute]
        if not s.offload_activations:
            fewer_activations.append({**recompute, "offload_activations": True})
        axes.insert(0, fewer_activations)
        steps += fewer_activations
        if not s.offload:
            axes.append([{"offload": True, "strategy": "fsdp2"}])
            steps.append({**steps[-1], "offload": True, "strategy": "fsdp2"})
        for step in steps:
            found = []
            for axis in axes:
                for change in axis:  # the mildest first
                    if plan_memory(dataclasses.replace(s, **{**step, **change})).device_bytes <= device_bytes:
                        found.append(_flags(s, {**step, **change}))
                        break
            if found:
                return list(dict.fromkeys(found))
        return []


def _flags(settings: Settings, changes: dict[str, Any]) -> str:
    names = {"world_size": "devices"}
    changed = dataclasses.replace(settings, **changes)  # where "all layers" is their number
    flags = [
        f"--{names.get(name, name)}" + ("" if value is True else f" {value}")
        for name, value in changes.items()
        if getattr(changed, name) != getattr(settings, name)
    ]
    return " ".join(flags)


# --- the parameters --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parameters:
    """Some of a model's parameters, as (rows, values per row): FSDP2 splits rows."""

    frozen: tuple[tuple[int, int, int], ...]  # the last number is the bytes per value
    adapters: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> _Parameters:
        parameters = list(parameters)
        shapes = [(p.shape[0], p.numel() // max(p.shape[0], 1), p.itemsize, p.requires_grad) for p in parameters]
        return cls(
            tuple((rows, width, size) for rows, width, size, learns in shapes if not learns),
            tuple((rows, width) for rows, width, _, learns in shapes if learns),
        )

    def frozen_bytes(self, shards: int) -> int:
        """Of a rank; ``shards`` = 1 gives the whole."""
        return sum(_rows(rows, shards) * width * size for rows, width, size in self.frozen)

    def adapter_values(self, shards: int) -> int:
        """Numbers of a rank that are trained: adapters or, of a model's ends, a head."""
        return sum(_rows(rows, shards) * width for rows, width in self.adapters)


@dataclass(frozen=True)
class _Projection:
    rows: int
    columns: int
    rank: int  # of its adapter, 0 for none


@dataclass(frozen=True)
class _Layer:
    """A decoder layer: its parameters, its 4-bit statistics in bytes, and what its activations depend on."""

    parameters: _Parameters
    statistics: int
    projections: dict[str, _Projection]  # by the last component of their names
    norms: tuple[tuple[int, int], ...]  # numbers of a token that are normalized, and in how many groups
    residuals: int  # tensors as wide as the residual stream that a compiled layer keeps
    normalizes_heads: bool  # queries and keys

    @classmethod
    def of(cls, layer: nn.Module) -> _Layer:
        ranks = {
            name.partition(".lora_A.")[0].rpartition(".")[2]: parameter.shape[0]
            for name, parameter in layer.named_parameters()
            if ".lora_A." in name
        }
        projections, statistics = {}, 0
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and not is_adapter(f"{name}.weight"):
                short = name.removesuffix(".base_layer").rpartition(".")[2]
                projections[short] = _Projection(module.out_features, module.in_features, ranks.get(short, 0))
            if isinstance(module, NF4Linear):
                statistics += sum(buffer.nbytes for buffer in module.buffers())
        found = cls(_Parameters.of(layer.parameters()), statistics, projections, (), 0, False)
        queries, keys = found.attention_widths
        norms = []
        for name, module in layer.named_modules():
            if type(module).__name__.endswith("RMSNorm"):
                size = int(next(module.parameters()).numel())
                width = {"q_norm": queries, "k_norm": keys}.get(name.rpartition(".")[2], size)
                norms.append((width, width // size))
        # The layer's input, the sum in its middle and, where norms are behind the sublayers, what each of them takes.
        # With norms in front too (Gemma), the sum in the middle is computed again.
        outer = sum(name.endswith("layernorm") for name, _ in layer.named_children())
        in_front = 2 if hasattr(layer, "input_layernorm") else 0
        residuals = 3 if in_front and outer > in_front else 2 + outer - in_front
        inner = any(name.endswith("q_norm") for name, _ in layer.named_modules())
        return dataclasses.replace(found, norms=tuple(norms), residuals=residuals, normalizes_heads=inner)

    @property
    def attention_widths(self) -> tuple[int, int]:
        """Q and K, the widths of queries and of keys."""
        queries = self.projections["o_proj"].columns
        if "qkv_proj" in self.projections:
            return queries, (self.projections["qkv_proj"].rows - queries) // 2
        return queries, self.projections["k_proj"].rows

    @property
    def mlp_width(self) -> int:
        """I, what the MLP's last projection takes."""
        return self.projections["down_proj"].columns


@dataclass(frozen=True)
class _Model:
    """What the plan takes from the model that :func:`~lightning_qlora.modules.models.build.build_structure` makes."""

    layers: tuple[_Layer, ...]
    ends: _Parameters  # embeddings, last norm and head
    has_logits: bool  # of the vocabulary
    ties_embeddings: bool
    vision: VisionSizes | None

    @classmethod
    def of(cls, config: PretrainedConfig, lora: LoraConfig, dtype: torch.dtype, head: Head) -> _Model:
        model = build_structure(config, lora, dtype=dtype, head=head)
        layers = [*model.decoder.layers]
        inside = {id(p) for layer in layers for p in layer.parameters()}
        if (vision := vision_sizes(model)) is not None:
            of_text = [*model.decoder.parameters(), *model.get_submodule("lm_head").parameters()]
            inside |= {id(p) for p in model.parameters()} - {id(p) for p in of_text}
        return cls(
            tuple(_Layer.of(layer) for layer in layers),
            _Parameters.of(p for p in model.parameters() if id(p) not in inside),
            isinstance(model, QLoRAForCausalLM),
            bool(model.config.tie_word_embeddings),
            vision,
        )


def _rows(rows: int, shards: int) -> int:
    return math.ceil(rows / shards)  # FSDP2 pads every shard to this


def _adapter_bytes(s: Settings, values: int) -> int:
    return values * (2 if s.precision == "bf16-true" else 4)


def _gathered_bytes(s: Settings, layer: _Layer) -> int:
    """A whole decoder layer."""
    return layer.parameters.frozen_bytes(1) + _adapter_bytes(s, layer.parameters.adapter_values(1))


# --- the activations -------------------------------------------------------------------------------------------------


def _cast_adapter_bytes(s: Settings, layer: _Layer) -> int:
    """Copies of A and B in the compute dtype, in mixed precision."""
    if not s.precision.endswith("mixed"):
        return 0
    return layer.parameters.adapter_values(1) * compute_dtype(s.precision).itemsize


def _kept_bytes(s: Settings, layer: _Layer) -> int:
    """What autograd keeps of a layer: see the module's docstring."""
    c, tokens, value = s.text, s.batch_size * s.seq_len, compute_dtype(s.precision).itemsize
    h, i, heads = int(c.hidden_size), layer.mlp_width, int(c.num_attention_heads)
    q, k = layer.attention_widths
    if sdpa_backend(s.compute_capability, compute_dtype(s.precision)) is SDPA_REPEATED_KV:
        k = q
    adapted = {name for name, p in layer.projections.items() if p.rank}
    norms = sum(4 * width + 4 * groups for width, groups in layer.norms)
    attention = value * (2 * q + 2 * k) + 4 * heads
    if attention_softcap(c) is not None and not s.flex:
        attention += 3 * 4 * heads * s.seq_len  # plain products: scores, capped scores and probabilities in float32
    mlp = 3 * value * i
    low = value * sum(p.rank for p in layer.projections.values())
    dropped = value + (value if s.compute_capability is None else 1)
    into_attention = bool(adapted & {"q_proj", "k_proj", "v_proj", "qkv_proj"})
    into_mlp = bool(adapted & {"gate_proj", "up_proj", "gate_up_proj"})
    inputs = value * (h * (into_attention + into_mlp) + i * ("down_proj" in adapted))
    if s.lora.lora_dropout:
        inputs = dropped * sum(p.columns for p in layer.projections.values() if p.rank)
    return tokens * (norms + attention + mlp + low + inputs) + _cast_adapter_bytes(s, layer)


def _kept_compiled(s: Settings, layer: _Layer) -> int:
    """What a compiled layer keeps that is not checkpointed: results of products and attention, and the residual sums.

    Tensors [T, H] of the residual stream; queries, keys (twice each if they are normalized), values, and the
    attention's result with a float32 log-sum per head; what the MLP's first products give [T, 2 I].
    """
    c, tokens, value = s.text, s.batch_size * s.seq_len, compute_dtype(s.precision).itemsize
    h, heads = int(c.hidden_size), int(c.num_attention_heads)
    q, k = layer.attention_widths
    low = sum(p.rank for p in layer.projections.values())
    attention = value * (2 * q + 2 * k) + 4 * heads
    if attention_softcap(c) is not None and not s.flex:
        attention += 3 * 4 * heads * s.seq_len
    normalized = q + k if layer.normalizes_heads else 0
    widths = layer.residuals * h + normalized + 2 * layer.mlp_width + low
    kept = tokens * (value * widths + attention) + _cast_adapter_bytes(s, layer)
    if s.lora.lora_dropout:
        kept = max(kept, _kept_bytes(s, layer))
    return kept


def _working_bytes(s: Settings, layer: _Layer, *, recomputes: bool) -> int:
    """What backward needs at most beyond what is kept (with checkpointing: than the recomputed layer keeps).

    * Around ``down_proj``, whose input [T, I] is freed: the gradients of that input and of its two factors; or one of
      them and the dequantized weight.
    * At the end of the model, while all layers are kept: the final norm's input and five float32 values of its size.
    * Compiled: as much. Measured (torch 2.11) are 9.16 GiB of a peak planned as 9.22 for 8B, 2.99 of 3.08 for 1B.
    """
    c, tokens, value = s.text, s.batch_size * s.seq_len, compute_dtype(s.precision).itemsize
    wide, narrow = tokens * layer.mlp_width, tokens * int(c.hidden_size)
    needed = wide * value + max(wide * value, _dequantized_bytes(s, layer))
    if recomputes:
        needed += value * narrow
    else:
        needed = max(needed + 2 * value * narrow, 6 * 4 * narrow)
    return needed


def _dequantized_bytes(s: Settings, layer: _Layer) -> int:
    """The largest weight in the compute dtype, which exists while its product is computed."""
    values = max(p.rows * p.columns for p in layer.projections.values())
    return values * compute_dtype(s.precision).itemsize


def _workspace_bytes(s: Settings) -> int:
    """cuBLAS' workspaces, one for the thread of the forward and one for autograd's."""
    if s.compute_capability is None:
        return 0
    return 2 * (32 * 2**20 if s.compute_capability >= (9, 0) else 8320 * 2**10)


def _pinned_bytes(nbytes: int) -> int:
    """What PyTorch takes of the host for a pinned tensor: it rounds up to a power of two.

    It keeps the memory for the next batch. This is what batches of the full length take, each done before the next:
    much shorter ones get blocks of their own, and so do micro-batches that the host queues before the device is there.
    """
    return 1 << (nbytes - 1).bit_length()


def _loss_bytes(s: Settings) -> int:
    """The final norm's float32 input, its result and the gradient of that, and a chunk of logits."""
    c, tokens, dtype = s.text, s.batch_size * s.seq_len, compute_dtype(s.precision)
    if not s.model.has_logits:
        return int(tokens * c.hidden_size * (2 * dtype.itemsize + 4))
    on_gpu = s.compute_capability is not None
    chunk = min(tokens, auto_chunk_tokens(c.vocab_size, dtype, compiled=on_gpu))
    # Compiled, the gradient replaces the logits. Otherwise the loss has its own; float32 needs no upcast.
    logit = dtype.itemsize + (0 if on_gpu else EAGER_BYTES_PER_LOGIT - (4 if dtype.itemsize == 4 else 0))
    hidden, vocab_size = int(c.hidden_size), int(c.vocab_size)
    return tokens * hidden * (2 * dtype.itemsize + 4) + chunk * (vocab_size * logit + hidden * dtype.itemsize)


# --- all of it -------------------------------------------------------------------------------------------------------


def plan_memory(settings: Settings) -> MemoryPlan:
    """Predict the memory of a training step from the second on (the first makes the optimizer's state).

    For ``checkpoint_activations="auto"`` it is the plan with the fewest recomputed layers that fits, or, if none does,
    with all of them; its ``settings`` say how many.
    """
    s = settings
    if s.checkpoint_activations == "auto":
        for number in range(int(s.offload_activations), len(s.model.layers) + 1):
            plan = plan_memory(dataclasses.replace(s, checkpoint_activations=number))
            if s.limit_bytes is None or plan.device_bytes <= s.limit_bytes:
                break
        return plan
    c, value = s.text, compute_dtype(s.precision).itemsize
    layers = s.model.layers
    tokens = s.batch_size * s.seq_len
    one_input = tokens * c.hidden_size * value
    adapters = _adapter_bytes(s, sum(layer.parameters.adapter_values(s.shards) for layer in layers))
    head = 4 * s.model.ends.adapter_values(s.shards)  # float32 in every precision
    of_vision = _adapter_bytes(s, s.model.vision.trained_values(s.shards)) if s.model.vision else 0
    matrix = c.vocab_size * c.hidden_size * value

    resident = {
        "4-bit layers": sum(layer.parameters.frozen_bytes(s.shards) for layer in layers),
        "embeddings and head": s.model.ends.frozen_bytes(s.shards),
        "adapters": adapters,
        "trained head": head,
        "optimizer state": 2 * (adapters + head + of_vision),
    }
    if (vision := s.model.vision) is not None:
        resident["vision side"] = vision.frozen_bytes(s.shards)
        resident["trained of the vision side"] = of_vision
    host = 0
    if s.offload:
        host, resident = sum(resident.values()) + adapters + head + of_vision, {}
    resident["statistics"] = sum(layer.statistics for layer in layers) + (vision.statistics if vision else 0)
    resident["workspace"] = _workspace_bytes(s)

    gradients = 0 if s.offload else adapters + head + of_vision
    if s.accumulate == 1 and s.strategy != "ddp":
        early_gradients = 0
    elif s.is_sharded and s.shards > 1:  # not reduced before the last micro-batch
        early_gradients = _adapter_bytes(s, sum(layer.parameters.adapter_values(1) for layer in layers))
        early_gradients += 4 * s.model.ends.adapter_values(1)
        early_gradients += _adapter_bytes(s, vision.trained_values(1)) if vision else 0
    else:
        early_gradients = gradients

    recomputed = layers[: s.recomputed]
    inputs = 0 if s.offload_activations else one_input
    stored = [inputs] * len(recomputed) + [
        (_kept_compiled if s.compile else _kept_bytes)(s, layer) for layer in layers[s.recomputed :]
    ]
    activations = 2 * value * s.seq_len * head_dim(c) + 32 * tokens  # rotary embeddings, tokens and labels
    if vision:
        activations += vision.kept_bytes(s.image_patches, value, bool(recomputed))
    returned = 0
    if not (recomputed or s.compile):
        activations -= tokens * (4 * c.hidden_size + 4)  # embeddings have no gradient: one norm less
    if s.offload_activations:
        # One input is back while its layer is recomputed and, compiled or in float32, until that layer's backward ends.
        # In forward one's memory is free as soon as its layer is queued, but for the first layer's where layers are
        # compiled: there it is a leaf of the autograd graph, which holds its leaves.
        returned = one_input
        activations += one_input if s.compile else 0
        host += len(recomputed) * (_pinned_bytes(one_input) if s.compute_capability else one_input)

    def in_backward(index: int) -> dict[str, int]:
        """Of the moment when layer ``index`` is differentiated: activations are freed and gradients made on the way."""
        layer, is_recomputed = layers[index], index < len(recomputed)
        behind = len(layers) - 1 - index
        made = max(0, gradients - early_gradients) * (behind + (index == 0)) // len(layers)
        again = 0
        if is_recomputed:  # in float32 the first norm keeps the layer's input itself
            again = _kept_bytes(s, layer) - (one_input if value == 4 else 0)
        return {
            "gradients": early_gradients + made,
            "activations": activations + sum(stored[: index + 1]) + (returned if is_recomputed else 0),
            "recomputed layer": again,
            "working memory": _working_bytes(s, layer, recomputes=is_recomputed),
        }

    # The peak is where going back begins or ends, or where the recomputed layers begin.
    candidates = {0, len(layers) - 1, max(len(recomputed) - 1, 0)}
    backward = max((in_backward(index) for index in candidates), key=lambda parts: sum(parts.values()))

    moments = {
        "loss": {
            **resident,
            "gradients": early_gradients,  # QLoRACausalLM frees those of the last step
            "activations": activations + sum(stored),
            "loss": _loss_bytes(s),
        },
        "backward": {**resident, **backward},
        "step": {**resident, "gradients": max(gradients, early_gradients)},
    }
    if vision and s.image_patches:  # after all of the decoder's backward, where the tower is trained
        moments = {"vision": {
            **resident, "gradients": gradients if vision.learns else early_gradients,
            "activations": activations - 32 * tokens,
            "working memory": vision.working_bytes(s.image_patches, value),
        }, **moments}  # fmt: skip
    if s.is_sharded:
        if not s.model.has_logits:  # a language model's head takes as much while more is there
            moments = {"embedding": dict(resident), **moments}
        _add_gathered(s, moments, matrix)
    return MemoryPlan(s, {name: {p: n for p, n in parts.items() if n} for name, parts in moments.items()}, host)


def _add_gathered(s: Settings, moments: dict[str, dict[str, int]], matrix: int) -> None:
    """What FSDP2 gathers: twice a group, as it arrives from all ranks and as the parameters that it is copied to."""
    loss, backward = moments["loss"], moments["backward"]
    sizes = [_gathered_bytes(s, layer) for layer in s.model.layers]
    group, everything = max(sizes), sum(sizes)
    arriving = group * max(1, s.prefetch) if s.shards > 1 else 0
    if s.reshard_after_forward:
        backward["gathered layers"] = group + arriving
    else:
        loss["gathered layers"] = backward["gathered layers"] = everything
    if not s.model.has_logits:
        moments["embedding"]["gathered embeddings"] = matrix * (2 if s.shards > 1 else 1)
    elif s.model.ties_embeddings:  # with the root, which stays gathered; the last layer's arrival is freed after it
        loss["gathered layers"] = loss.get("gathered layers", 0) + arriving
        loss["gathered embeddings"] = backward["gathered embeddings"] = matrix
    elif s.shards > 1:  # as it arrives, so does the last layer, whose buffer is gone when the loss starts
        loss["gathered head"] = 2 * matrix + max(0, arriving - loss["loss"])
    else:  # the copy from the host is gone when the loss starts
        loss["gathered head"] = matrix + max(0, matrix - loss["loss"])
    if s.model.vision and "vision" in moments:
        block, trained = s.model.vision.largest_block
        gathered = block + _adapter_bytes(s, trained)
        moments["vision"]["gathered blocks"] = gathered * (1 + max(1, s.prefetch) if s.shards > 1 else 1)
    if s.shards > 1:
        most = max(layer.parameters.adapter_values(1) for layer in s.model.layers)
        backward["reduced gradients"] = 2 * _adapter_bytes(s, most)
