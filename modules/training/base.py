"""What all LightningModules here share: build, shard and load a QLoRA model, exact steps, adapter-only checkpoints.

Shapes: B samples, S tokens a sample. A *step* is an optimizer step; it takes ``accumulate_grad_batches`` micro-batches
on each rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..attention import AttentionBackend, choose_attention
from ..checkpoints.chat_format import ChatFormat
from ..checkpoints.loading import LoadReport
from ..checkpoints.safetensors_files import SafetensorsCheckpoint
from ..distributed.collectives import all_reduce_sum, gather_objects
from ..distributed.trained_checkpoints import check_state, read_checkpoint, trained_shapes
from ..hardware import check_precision, compute_dtype
from ..lora.adapter_files import load_adapter, read_adapter, save_adapter
from ..lora.config import adapter_lora, check_lora, default_lora, lora_to_dict, with_head
from ..models.build import build_model, materialize
from ..models.causal_lm import LanguageModelHead
from ..models.decoder import Head, QLoRADecoder
from ..models.decoder_layer import CheckpointChoice
from ..models.families import attention_request, head_dim, layer_windows, load_config
from ..models.options import ComputeOptions
from .memory_plan import GIB, bytes_outside_allocator
from .optimizer import ShardAdamW, global_norm, gradients, scale_
from .resume_identity import BaseIdentity

#: What micro-batches divide their loss sums by: any constant does, this one suits float16.
LOSS_DIVISOR = 1024.0

#: Key of this module's own entry in a training checkpoint.
CHECKPOINT_KEY = "lightning_qlora"


class _Schedule(LambdaLR):
    """Of this module; a class of its own tells it from a subclass's."""


class _MeanOfSum(torch.autograd.Function):
    """The mean of ``tokens`` losses from their sum; its gradient is that of the sum divided by ``LOSS_DIVISOR``."""

    @staticmethod
    def forward(ctx: Any, loss_sum: Tensor, tokens: int) -> Tensor:
        return loss_sum / max(tokens, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / LOSS_DIVISOR, None


_UNHARMED = (
    "The weights are still those of the step before. Look at that data, or resume from the last checkpoint with a "
    "lower learning rate."
)


class QLoRAModule(L.LightningModule):
    """Base of the LightningModules that train LoRA adapters on a base model that is frozen in 4 bits.

    A subclass says what its model computes for a batch: :meth:`loss_sum`.

    The loss of a step is the mean over *all* its tokens that count: those of every micro-batch and rank, however
    unequal. ``training_step`` returns the mean of its micro-batch, but hands the gradient of the *sum* over a constant
    back; the step rescales the gradients once by the count of all. A term that is to be added to the loss belongs into
    :meth:`loss_sum`, summed over tokens as well. A subclass with a ``training_step`` of its own gets the gradients of
    what that returns, as in any LightningModule, and logs for itself.

    Logged: ``train_loss`` (mean over the step's tokens), ``lr``, ``grad_norm`` (before clipping), ``val_loss``.

    Its arguments are saved as hyperparameters, in JSON types: for loggers, and for ``load_from_checkpoint``, which
    builds the model on one device. A loss and other objects have to be passed to that again.

    Args:
        model_dir: A transformers directory of a model of a known family (``models/families.py``) with safetensors,
            16-bit or bitsandbytes 4-bit.
        lora: Adapters, as peft's configuration or its fields. Default: those of ``init_adapter``, or
            :func:`~lightning_qlora.modules.lora.config.default_lora`.
        learning_rate: Peak of the schedule.
        warmup_steps: Steps of linear warm-up.
        schedule: After warm-up ``"cosine"`` or ``"linear"`` decay to 0 at the last step, or ``"constant"``.
        weight_decay: AdamW's, on the adapters.
        compute: Activation checkpointing and offloading, attention, sliding window and compilation; or its fields.
        packing: Whether batches hold packed rows, which ``attention="auto"`` goes by.
        compile_backend: As in :func:`~lightning_qlora.modules.models.compilation.compile_region`.
        head: What the model computes from the decoder's hidden states; default a language model's logits and loss.
        init_adapter: Directory of a peft LoRA adapter to continue from.
        model_name: How reports and the saved adapter name the base; default ``model_dir``.
        seed: Of the LoRA initialisation and of dropout.

    Raises:
        ValueError: For settings out of range, a directory that holds no model of a known family, or an unsupported
            ``lora``.
    """

    report_key = "loading"

    def __init__(
        self,
        model_dir: str | Path,
        lora: LoraConfig | dict[str, Any] | None = None,
        *,
        learning_rate: float = 2e-4,
        warmup_steps: int = 0,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        weight_decay: float = 0.0,
        compute: ComputeOptions | dict[str, Any] = ComputeOptions(),  # noqa: B008  frozen
        packing: bool = False,
        compile_backend: str | Callable[..., Any] = "inductor",
        head: Head = LanguageModelHead(),  # noqa: B008  frozen
        init_adapter: str | Path | None = None,
        model_name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ValueError(f"learning_rate must be a positive finite number, got {learning_rate}.")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}.")
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"weight_decay must be a finite number of at least 0, got {weight_decay}.")
        if schedule not in ("cosine", "linear", "constant"):
            raise ValueError(f"schedule must be 'cosine', 'linear' or 'constant', got {schedule!r}.")
        self.model_dir = Path(model_dir)
        config = load_config(self.model_dir, vision=head.takes_images)
        compute = ComputeOptions(**compute) if isinstance(compute, dict) else compute
        if isinstance(lora, dict):
            lora = LoraConfig(**lora)
        elif lora is None:
            lora = default_lora() if init_adapter is None else adapter_lora(init_adapter)
        lora = with_head(check_lora(lora, head.trained_modules), head.trained_modules, head.task_type)
        self.head, self.lora = head, head.with_targets(lora, config)
        self.learning_rate, self.warmup_steps, self.schedule = learning_rate, warmup_steps, schedule
        self.weight_decay = weight_decay
        layer_windows(config, compute.sliding_window)  # refuses what does not go together
        self.compute, self.packing, self.compile_backend = compute, packing, compile_backend
        self.init_adapter = None if init_adapter is None else Path(init_adapter)
        if self.init_adapter is not None:
            read_adapter(self.init_adapter, self.lora)
        self.model_name = model_name or str(model_dir)
        self.seed = seed
        self.save_hyperparameters(
            {
                "model_dir": str(model_dir), "lora": lora_to_dict(lora), "learning_rate": learning_rate,
                "warmup_steps": warmup_steps, "schedule": schedule, "weight_decay": weight_decay,
                "compute": dataclasses.asdict(compute), "packing": packing, "model_name": self.model_name, "seed": seed,
            }
        )  # fmt: skip
        self.base = SafetensorsCheckpoint(self.model_dir)
        self.identity = BaseIdentity.of(self.base, self.lora)
        self.strict_loading = False  # checkpoints hold only what is trained
        self.model: QLoRADecoder | None = None
        self.chat_format: ChatFormat | None = None
        """How the finetuned model is talked to, if that is known: saved with adapters, and used for answers."""
        self._load: LoadReport | None = None
        self._pending: list[tuple[Tensor, int]] = []
        self._val: list[tuple[Tensor, int]] = []

    # --- model -------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build, shard and load the model: structure on the meta device first, so that no rank ever holds all of it.

        Without a Trainer (``load_from_checkpoint``) all of it is built on this module's device.
        """
        if self.model is not None:
            return
        strategy, parameters_on = None, None
        if self._trainer is None:
            device, dtype = self.device, compute_dtype(check_precision("auto"))
        else:
            strategy = self.trainer.strategy
            device, dtype = strategy.root_device, compute_dtype(self.trainer.precision_plugin.precision)
            self._limit_memory(device)
        attention = self._attention(device, dtype)
        model = build_model(
            self.base, self.lora, dtype=dtype, attention=attention, sliding_window=self.compute.sliding_window,
            checkpoint_activations=self._checkpoints(device),
            offload_activations=self.compute.offload_activations, head=self.head,
        )  # fmt: skip
        model.compile_regions(self.compute.compile, backend=self.compile_backend)
        self.adapt(model)
        if shard := getattr(strategy, "shard", None):  # every strategy of this library has it, Lightning's do not
            shard(model, model.shard_groups())
            parameters_on = getattr(strategy, "parameters_device", None)
        self._load = materialize(model, self.base, device, seed=self.seed, parameters_on=parameters_on)
        if self.init_adapter is not None:
            load_adapter(model, self.init_adapter, self.lora)
        self.model = model

    def _checkpoints(self, device: torch.device) -> CheckpointChoice:
        """Which layers are recomputed; where nobody has planned it, on a GPU all of them."""
        choice = self.compute.checkpoint_activations
        if choice != "auto":
            return choice
        if device.type != "cuda":
            return self.compute.offload_activations
        rank_zero_info(
            "Activation checkpointing: all decoder layers are recomputed in backward, because no memory plan was made. "
            "plan_memory() says how many need to be; pass that number as checkpoint_activations."
        )
        return True

    def _limit_memory(self, device: torch.device) -> None:
        """Hold PyTorch's allocator to ``memory_limit_gib``."""
        if device.type == "cuda" and self.compute.memory_limit_gib is not None:
            allowed = self.compute.memory_limit_gib * GIB - bytes_outside_allocator(self.trainer.world_size)
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, allowed) / total), device)

    def _attention(self, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
        """The backend, after having said which and why."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        request = attention_request(
            load_config(self.model_dir, vision=self.head.takes_images), packed=self.packing,
            sliding_window=self.compute.sliding_window, compute_capability=capability, dtype=dtype,
        )  # fmt: skip
        backend, reason = choose_attention(self.compute.attention, request)
        rank_zero_info(f"Attention: {backend.name}. {reason}")
        return backend

    def adapt(self, model: Any) -> None:
        """Change the model's structure before it is sharded and loaded: for subclasses, nothing here."""

    def loss_sum(self, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """The loss of a batch, summed over its tokens that count (float32, 0-dim), and how many these are."""
        raise NotImplementedError(f"{type(self).__name__} must define loss_sum().")

    def report_section(self) -> dict[str, float] | None:
        """For a run's report, under ``report_key``: how long rank 0 read weights, in seconds, and how many bytes."""
        return None if self._load is None else dataclasses.asdict(self._load)

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of a token in a sample of ``seq_len``, forward and backward, without what checkpointing repeats.

        Four a frozen weight (no gradient of its own), six a trained one, and attention without regard to causality.
        """
        config = self._model.config.get_text_config()
        attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim(config) * seq_len
        return float(self._flops_of_weights + attention)

    @functools.cached_property
    def _flops_of_weights(self) -> int:  # walking through all modules takes milliseconds, in every micro-batch
        linears = [module for module in self._counted_modules() if isinstance(module, nn.Linear)]
        return sum((6 if m.weight.requires_grad else 4) * m.in_features * m.out_features for m in linears)

    def _counted_modules(self) -> list[nn.Module]:
        """What each token goes through."""
        return [*self._model.modules()]

    @property
    def _model(self) -> QLoRADecoder:
        if self.model is None:
            raise RuntimeError("The model does not exist before configure_model(), which the Trainer calls.")
        return self.model

    # --- training ----------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Forget micro-batches of a step that an earlier ``fit`` did not finish: their gradients are gone too.

        And take the learning rate of the step to come from the schedule, not from the checkpoint: that may be of a run
        with fewer steps, whose schedule has ended at 0.
        """
        self._pending.clear()
        for config in self.trainer.lr_scheduler_configs:
            schedule = config.scheduler
            if not isinstance(schedule, _Schedule):
                continue
            rates = [
                rate * at(schedule.last_epoch) for rate, at in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            ]
            before = [group["lr"] for group in schedule.optimizer.param_groups]
            if rates == before:
                continue
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            rank_zero_info(
                f"The learning rate schedule spans {self.trainer.estimated_stepping_batches} steps now. The rate of "
                f"step {self.trainer.global_step + 1} is {rates[0]:.3g}; in the checkpoint it was {before[0]:.3g}."
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make dropout a function of (seed, micro-batch, rank), so that a resumed run repeats the first one's."""
        if self.lora.lora_dropout > 0:
            micro_batch = self.trainer.fit_loop.epoch_loop.total_batch_idx
            torch.manual_seed(((self.seed * 1_000_003 + micro_batch) * 4_099 + self.global_rank) % 2**63)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The micro-batch's mean loss; its gradient is that of the sum until :meth:`on_before_optimizer_step`."""
        loss, tokens = self.loss_sum(batch)
        self._pending.append((loss.detach(), tokens))
        mean: Tensor = _MeanOfSum.apply(loss, tokens)  # type: ignore[no-untyped-call]
        return mean

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Rescale the accumulated gradients to those of the mean over all tokens of the step, and log that mean.

        Raises:
            FloatingPointError: On all ranks, if the loss is not finite and no loss scaler skips the step.
        """
        self.log("lr", optimizer.param_groups[0]["lr"])
        if not self._pending:  # a subclass's training_step
            return
        local = [loss for loss, _ in self._pending]
        loss_sum, tokens = self._reduce(self._pending)
        if not math.isfinite(loss_sum):
            self._refuse_step(local)
        # Undone here: the divisor, Lightning's division by the accumulation, and the strategy's mean over ranks.
        scale = LOSS_DIVISOR * self.trainer.accumulate_grad_batches * self.trainer.world_size / max(tokens, 1)
        scale_(gradients(optimizer), scale)
        self.log("train_loss", loss_sum / max(tokens, 1), prog_bar=True)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over all ranks (``Trainer(gradient_clip_val=...)``), and log that norm.

        Raises:
            FloatingPointError: On all ranks, if the norm is not finite and no loss scaler skips the step.
        """
        trained = gradients(optimizer)
        norm = global_norm(trained)
        self.log("grad_norm", norm)
        # The device is idle here, for the loss has just been read: this costs no more than its own latency.
        if self._scaler is None and not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient norm of optimizer step {self.trainer.global_step + 1} is {float(norm)} though its loss "
                f"is finite: the backward overflowed. {_UNHARMED}"
            )
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm in (None, "norm"):
            scale_(trained, (gradient_clip_val / (norm + 1e-6)).clamp(max=1.0))
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, then free the gradients: Lightning does so after the next forward, at the loss, where memory peaks."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad(set_to_none=True)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _refuse_step(self, losses: list[Tensor]) -> None:
        """Say which micro-batches of which ranks have no finite loss, and raise unless the scaler skips the step."""
        mine = [(self.global_rank, i) for i, loss in enumerate(losses) if not math.isfinite(loss)]
        named = ", ".join(f"micro-batch {i} of rank {rank}" for part in gather_objects(mine) for rank, i in part)
        what = f"The loss of optimizer step {self.trainer.global_step + 1} is not finite: {named}."
        if self._scaler is None:
            raise FloatingPointError(f"{what} {_UNHARMED}")
        rank_zero_warn(f"{what} All ranks skip this step.")

    def on_validation_epoch_start(self) -> None:
        """Forget batches of a validation that was interrupted."""
        self._val.clear()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Collect the batch's loss sum and token count."""
        self._val.append(self.loss_sum(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all tokens of all ranks."""
        self._log_mean("val_loss")

    def on_test_epoch_start(self) -> None:
        """As before a validation: forget batches of one that was interrupted, whatever a subclass keeps of them."""
        self.on_validation_epoch_start()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log ``test_loss``, the mean over all tokens of all ranks."""
        self._log_mean("test_loss")

    def _log_mean(self, name: str) -> None:
        loss_sum, tokens = self._reduce(self._val)
        # Equal on all ranks already; sync_dist only tells Lightning so.
        self.log(name, loss_sum / max(tokens, 1), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on what is trained, with a schedule by step."""
        trained = [p for p in self.parameters() if p.requires_grad]
        missing = [n for n, p in self.named_parameters() if p.requires_grad != self._model.is_trained(n)]
        assert not missing, f"requires_grad is wrong for {missing[:3]}"
        optimizer = ShardAdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        schedule = _Schedule(optimizer, lambda step: self._schedule(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _schedule(self, step: int, steps: float) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant" or not math.isfinite(steps):
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, steps - self.warmup_steps))
        return 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    def _reduce(self, parts: list[tuple[Tensor, int]]) -> tuple[float, int]:
        """Sum (loss, tokens) over ``parts`` and ranks, and empty ``parts``. The step's only wait for the device."""
        loss = float(torch.stack([loss.double() for loss, _ in parts]).sum()) if parts else 0.0
        tokens = sum(tokens for _, tokens in parts)
        parts.clear()
        loss, total = all_reduce_sum([loss, tokens], self.device)
        return loss, int(total)

    # --- in and out --------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module's; what is frozen comes from the base, and is not reported as missing."""
        keys = super().load_state_dict(state_dict, strict=strict, assign=assign)
        trained = trained_shapes(self)
        keys.missing_keys[:] = [name for name in keys.missing_keys if name in trained]
        return keys

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what is trained, whatever the strategy collected, and add what identifies base and adapters."""
        trained = trained_shapes(self)
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in trained}
        checkpoint[CHECKPOINT_KEY] = self.identity.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base or LoRA shape, or a partial one.

        Raises:
            ValueError: Naming what differs or is missing.
        """
        self.identity.check(checkpoint.get(CHECKPOINT_KEY, {}), "The checkpoint")
        if self.model is not None:
            # Loading is not strict, for the base is not in the checkpoint; so what must be there is checked here.
            trained = trained_shapes(self)
            state = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name in trained}
            check_state(state, trained, "to resume from")

    def check_checkpoint(self, path: str | Path | None) -> None:
        """Check, before any model is built, that training can resume from ``path``; ``None`` is fine.

        Raises:
            ValueError: If the checkpoint is damaged or made for another base or LoRA shape.
        """
        if path is not None:
            self.identity.check(read_checkpoint(path).get(CHECKPOINT_KEY, {}), path)

    def save_adapter(self, directory: str | Path) -> None:
        """Write the adapter in peft's format (``PeftModel.from_pretrained`` loads it). All ranks must call it."""
        save_adapter(self._model, directory, self.lora, self.model_name, write=self.global_rank == 0)
        if self.chat_format is not None and self.global_rank == 0:
            self.chat_format.save(directory)
