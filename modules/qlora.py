"""The LightningModule: QLoRA finetuning of a Llama, on one device or sharded by :class:`FSDP2Strategy`.

Shapes: B samples, S tokens a sample. A *step* is an optimizer step; it takes ``accumulate_grad_batches`` micro-batches
on each rank.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import LoraConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer

from lightning_qlora.modules.adapters import load_adapter, read_adapter, save_adapter
from lightning_qlora.modules.capabilities import compute_dtype
from lightning_qlora.modules.fsdp2_strategy import FSDP2Strategy, all_reduce_sum, check_state, read_checkpoint
from lightning_qlora.modules.llama import (
    BaseIdentity,
    QLoRALlamaForCausalLM,
    build_llama,
    check_lora,
    default_lora,
    load_config,
    materialize,
)
from lightning_qlora.modules.nf4_linear import local_tensor
from lightning_qlora.modules.weights import SafetensorsCheckpoint

#: What micro-batches divide their loss sums by: any constant does, this one suits float16.
LOSS_DIVISOR = 1024.0

#: Key of this module's own entry in a training checkpoint.
CHECKPOINT_KEY = "lightning_qlora"


class QLoRALlama(L.LightningModule):
    """Finetunes LoRA adapters on a Llama whose base is frozen in 4 bits.

    A batch is a dict with ``input_ids`` and ``labels``, int64 [B, S], right-padded, labels -100 where no loss is taken,
    and ``num_loss_tokens``, the number of other labels in ``labels[:, 1:]`` as a python int. No attention mask is
    needed: attention is causal, so a token never sees the padding to its right.

    The loss of a step is the mean over *all* its tokens that count: those of every micro-batch and rank, however
    unequal. Micro-batches back-propagate sums with a constant divisor, and the step rescales the gradients once by the
    count.

    Logged: ``train_loss`` (mean over the step's tokens), ``lr``, ``grad_norm`` (before clipping), ``val_loss``.

    Args:
        model_dir: A transformers directory of a Llama with safetensors, 16-bit or bitsandbytes 4-bit.
        lora: Adapters; default :func:`default_lora`.
        learning_rate: Peak of the schedule.
        warmup_steps: Steps of linear warm-up.
        schedule: After warm-up ``"cosine"`` or ``"linear"`` decay to 0 at the last step, or ``"constant"``.
        weight_decay: AdamW's, on the adapters.
        checkpoint_activations: Recompute each layer in backward: less memory for about a third more compute.
        init_adapter: Directory of a peft LoRA adapter to continue from.
        model_name: How reports and the saved adapter name the base; default ``model_dir``.
        seed: Of the LoRA initialisation and of dropout.

    Raises:
        ValueError: For settings out of range, a directory that is no Llama checkpoint, or an unsupported ``lora``.
    """

    def __init__(
        self,
        model_dir: str | Path,
        lora: LoraConfig | None = None,
        *,
        learning_rate: float = 2e-4,
        warmup_steps: int = 0,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        weight_decay: float = 0.0,
        checkpoint_activations: bool = False,
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
        load_config(self.model_dir)
        self.lora = check_lora(lora or default_lora())
        self.learning_rate, self.warmup_steps, self.schedule = learning_rate, warmup_steps, schedule
        self.weight_decay, self.checkpoint_activations = weight_decay, checkpoint_activations
        self.init_adapter = None if init_adapter is None else Path(init_adapter)
        if self.init_adapter is not None:
            read_adapter(self.init_adapter, self.lora)
        self.model_name = model_name or str(model_dir)
        self.seed = seed
        self.base = SafetensorsCheckpoint(self.model_dir)
        self.identity = BaseIdentity.of(self.base, self.lora)
        self.strict_loading = False  # checkpoints hold the adapters only
        self.model: QLoRALlamaForCausalLM | None = None
        self._pending: list[tuple[Tensor, int]] = []
        self._val: list[tuple[Tensor, int]] = []

    # --- model -------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build, shard and load the model: structure on the meta device first, so that no rank ever holds all of it."""
        if self.model is not None:
            return
        strategy = self.trainer.strategy
        dtype = compute_dtype(self.trainer.precision_plugin.precision)
        model = build_llama(self.base, self.lora, dtype=dtype, checkpoint_activations=self.checkpoint_activations)
        device, parameters_on = strategy.root_device, None
        if isinstance(strategy, FSDP2Strategy):
            strategy.shard(model, model.shard_groups())
            parameters_on = strategy.parameters_device
        materialize(model, self.base, device, seed=self.seed, parameters_on=parameters_on)
        if self.init_adapter is not None:
            load_adapter(model, self.init_adapter, self.lora)
        self.model = model

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Logits [B, S, V] of ``input_ids`` int64 [B, S], in the compute dtype."""
        return self._model(input_ids=input_ids, **kwargs).logits  # type: ignore[no-any-return]

    @property
    def _model(self) -> QLoRALlamaForCausalLM:
        if self.model is None:
            raise RuntimeError("The model does not exist before configure_model(), which the Trainer calls.")
        return self.model

    # --- training ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make dropout a function of (seed, micro-batch, rank), so that a resumed run repeats the first one's."""
        if self.lora.lora_dropout > 0:
            micro_batch = self.trainer.fit_loop.epoch_loop.total_batch_idx
            torch.manual_seed(((self.seed * 1_000_003 + micro_batch) * 4_099 + self.global_rank) % 2**63)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The micro-batch's loss sum over a constant; :meth:`on_before_optimizer_step` makes it the mean's."""
        loss = self._loss_sum(batch)
        self._pending.append((loss.detach(), batch["num_loss_tokens"]))
        return loss / LOSS_DIVISOR

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Rescale the accumulated gradients to those of the mean over all tokens of the step, and log that mean."""
        loss_sum, tokens = self._reduce(self._pending)
        # Undone here: the divisor, Lightning's division by the accumulation, and the strategy's mean over ranks.
        scale = LOSS_DIVISOR * self.trainer.accumulate_grad_batches * self.trainer.world_size / max(tokens, 1)
        for parameter in self._trained():
            if parameter.grad is not None:
                local_tensor(parameter.grad).mul_(scale)
        self.log("train_loss", loss_sum / max(tokens, 1), prog_bar=True)
        self.log("lr", optimizer.param_groups[0]["lr"])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over all ranks (``Trainer(gradient_clip_val=...)``), and log that norm."""
        parameters = self._trained()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self.log("grad_norm", norm)
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Collect the batch's loss sum and token count."""
        self._val.append((self._loss_sum(batch), batch["num_loss_tokens"]))

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all tokens of all ranks."""
        loss_sum, tokens = self._reduce(self._val)
        # Equal on all ranks already; sync_dist only tells Lightning so.
        self.log("val_loss", loss_sum / max(tokens, 1), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on the adapters, with a schedule by step."""
        trained = self._trained()
        missing = [n for n, p in self.named_parameters() if p.requires_grad != ("lora_" in n)]
        assert not missing, f"requires_grad is wrong for {missing[:3]}"
        optimizer = AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        schedule = LambdaLR(optimizer, lambda step: self._schedule(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _schedule(self, step: int, steps: float) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant" or not math.isfinite(steps):
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, steps - self.warmup_steps))
        return 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    def _loss_sum(self, batch: dict[str, Any]) -> Tensor:
        # The loss is computed inside the forward of the module that FSDP2 took as its root: only there are weights
        # gathered.
        output = self._model(input_ids=batch["input_ids"], labels=batch["labels"], num_items_in_batch=1)
        return output.loss  # type: ignore[no-any-return]

    def _reduce(self, parts: list[tuple[Tensor, int]]) -> tuple[float, int]:
        """Sum (loss, tokens) over ``parts`` and ranks, and empty ``parts``. The step's only wait for the device."""
        loss = float(torch.stack([loss.double() for loss, _ in parts]).sum()) if parts else 0.0
        tokens = sum(tokens for _, tokens in parts)
        parts.clear()
        loss, total = all_reduce_sum([loss, tokens], self.device)
        return loss, int(total)

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def _trained_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.named_parameters() if p.requires_grad}

    # --- in and out --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what is trained, whatever the strategy collected, and add what identifies base and adapters."""
        trained = self._trained_shapes()
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
            trained = self._trained_shapes()
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

    @torch.no_grad()
    def answer(self, prompt: str, max_new_tokens: int = 64) -> str:
        """Greedy answer to a one-turn chat with ``prompt``. All ranks of a sharded model must call it together."""
        tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.device)
        training = self.training
        self.eval()
        with self.trainer.precision_plugin.forward_context():
            tokens = self._model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        self.train(training)
        return str(
            tokenizer.decode(
                tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        ).strip()
