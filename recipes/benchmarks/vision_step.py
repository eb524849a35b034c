"""Measure QLoRA training of a vision-language model on random weights of a named shape: ours, or a peer's same work.

    python recipes/benchmarks/vision_step.py --shape qwen2.5-vl-7b --batch_size 4
    python recipes/benchmarks/vision_step.py --shape qwen2.5-vl-7b --batch_size 4 --peer
    python recipes/benchmarks/vision_step.py --shape llava-1.5-7b --batch_size 4 --devices 2

The first run of a shape writes its checkpoint (16 GB in bfloat16), which both quantize while they load it: the language
model to 4 bits, the vision side stays in 16. Every sample has one image (--image_side patches a side) and text up to
--seq_len tokens. The peer is plain transformers + peft + bitsandbytes, with one adapter configuration for both. Without
a GPU it runs the tiny shape on the CPU. A run adds one row to ``results/vision_step.json``: see ``train_step.py``.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import get_peft_model
from record import RESULTS
from torch import Tensor, nn
from train_step import COMPUTE_FLAGS, GIB, LEARNING_RATE, STRATEGY_FLAGS, Meter, record_run, train_ours
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PretrainedConfig

from lightning_qlora.modules.checkpoints.random_weights import CHECKPOINTS, vision_checkpoint_of
from lightning_qlora.modules.cli import Only, positive, run_recipe
from lightning_qlora.modules.distributed.strategies import StrategyOptions
from lightning_qlora.modules.hardware import capabilities, compute_dtype
from lightning_qlora.modules.lora.config import LoraOptions
from lightning_qlora.modules.models.families import load_config
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.models.vision_language import VisionLanguageHead
from lightning_qlora.modules.training.memory_plan import Settings, plan_memory
from lightning_qlora.modules.training.vision_language import QLoRAVisionLanguage


def main(
    shape: Literal["tiny-vl", "qwen2.5-vl-7b", "llava-1.5-7b"] | None = None,
    batch_size: int = 4,
    seq_len: int | None = None,
    image_side: int = 36,
    steps: int = 8,
    warmup: int = 3,
    peer: bool = False,
    checkpoints: Path = CHECKPOINTS,
    results: Path = RESULTS,
    commit: str | None = None,
    lora: Annotated[LoraOptions, Only("lora_r")] = LoraOptions(lora_r=64),
    strategy: Annotated[StrategyOptions, STRATEGY_FLAGS] = StrategyOptions(),
    compute: Annotated[ComputeOptions, COMPUTE_FLAGS] = ComputeOptions(checkpoint_activations="all"),
) -> int:
    """Measure, print and record one configuration.

    Args:
        shape: Shape of the model. Default: qwen2.5-vl-7b on a GPU, tiny-vl on CPU.
        batch_size: Samples per step on each device, each with one image.
        seq_len: Tokens per sample, the image's included. Default: 1024 on a GPU, 128 on CPU.
        image_side: Patches along each side of an image of Qwen2.5-VL; Llava has 24.
        steps: Measured steps.
        warmup: Warm-up steps before the measured ones.
        peer: Measure plain transformers and peft in place of lightning-qlora, on one device.
        checkpoints: Directory where checkpoints of random weights are kept.
        results: Directory of the record.
        commit: Commit of the code measured; read from git unless given.
        lora, strategy, compute: Groups of flags.
    """
    positive(batch_size=batch_size, steps=steps, warmup=warmup, image_side=image_side)
    strategy = strategy.check()
    if peer and (strategy.devices > 1 or compute.compile != "off"):
        raise ValueError("--peer trains on one device, uncompiled. Leave --devices and --compile out.")
    if image_side % 2:
        raise ValueError(f"--image_side must be even, because four patches make a token; got {image_side}.")
    on_gpu = torch.cuda.is_available()
    shape = shape or ("qwen2.5-vl-7b" if on_gpu else "tiny-vl")
    seq_len = seq_len or (1024 if on_gpu else 128)
    directory = vision_checkpoint_of(shape, checkpoints)
    config = load_config(directory, vision=True)
    head = VisionLanguageHead.of(config)
    meter = Meter(steps, warmup, None, with_profile=False)
    batches = functools.partial(random_batches, config, batch_size, seq_len, image_side, meter.total_steps)
    planned: dict[str, Any] = {}
    if peer:
        train_peer(directory, batches(0), meter, strategy.precision, head, lora, compute)
    else:
        plan = plan_memory(
            Settings.of(
                config, lora.config(), strategy, compute, batch_size=batch_size, seq_len=seq_len,
                device=capabilities(), head=head, image_patches=patches_of(config, image_side) * batch_size,
            )
        )  # fmt: skip
        compute = replace(compute, checkpoint_activations=plan.settings.recomputed)
        planned = {"recomputed_layers": plan.settings.recomputed, "planned_gib": plan.total_bytes / GIB}
        module = QLoRAVisionLanguage(
            directory, lora.config(), learning_rate=LEARNING_RATE, schedule="constant", compute=compute
        )
        train_ours(module, batches, meter, strategy)
    figures = meter.gather()
    if figures is None:
        return 0
    tokens_per_s = batch_size * seq_len * strategy.devices / (figures["step_ms"]["p50"] / 1000)
    what = "transformers + peft" if peer else f"lightning-qlora {strategy.strategy}"
    options = [f"compile {compute.compile}"] * (compute.compile != "off") + [f"{image_side} patches a side"]
    settings = [", ".join([what, *options]), shape, strategy.precision, strategy.devices, f"{batch_size} x {seq_len}"]
    record_run(
        [*settings, lora.lora_r], {**figures, **planned, "tokens_per_s": tokens_per_s}, results, commit,
        name="vision_step",
    )  # fmt: skip
    return 0


def patches_of(config: PretrainedConfig, side: int) -> int:
    """Patches of an image, which the tower computes."""
    vision = config.vision_config
    return side**2 if config.model_type == "qwen2_5_vl" else (vision.image_size // vision.patch_size) ** 2 + 1


def random_batches(
    config: PretrainedConfig, batch_size: int, seq_len: int, side: int, count: int, rank: int
) -> list[dict[str, Any]]:
    """``count`` batches for a rank: an image at the beginning of each sample, then text that is trained."""
    generator, vision = torch.Generator().manual_seed(rank), config.vision_config
    images: dict[str, Tensor] = {}
    if config.model_type == "qwen2_5_vl":
        tokens = side**2 // 4
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        images["pixel_values"] = torch.randn(batch_size * side**2, width, generator=generator)
        images["image_grid_thw"] = torch.tensor([[1, side, side]] * batch_size)
    else:
        tokens = (vision.image_size // vision.patch_size) ** 2
        images["pixel_values"] = torch.randn(batch_size, 3, vision.image_size, vision.image_size, generator=generator)
    if seq_len < tokens + 2:
        raise ValueError(f"--seq_len={seq_len} has no room for the {tokens} tokens of an image and some text.")
    batches = []
    for _ in range(count):
        # Ids below all special tokens.
        ids = torch.randint(3, config.text_config.vocab_size * 9 // 10, (batch_size, seq_len), generator=generator)
        ids[:, 1 : 1 + tokens] = config.image_token_id
        labels = ids.masked_fill(ids == config.image_token_id, -100)
        kinds = {"mm_token_type_ids": (ids == config.image_token_id).int()} if "image_grid_thw" in images else {}
        loss_tokens = int((labels[:, 1:] != -100).sum())
        batches.append({"input_ids": ids, "labels": labels, "num_loss_tokens": loss_tokens, **images, **kinds})
    return batches


def train_peer(
    directory: Path, batches: list[dict[str, Any]], meter: Meter, precision: str, head: VisionLanguageHead,
    lora: LoraOptions, compute: ComputeOptions,
) -> None:  # fmt: skip
    """Train with transformers, peft and bitsandbytes on one device."""
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), compute_dtype(precision)
    meter.begin(device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "model.visual", "model.vision_tower", "model.multi_modal_projector"],
    )  # fmt: skip
    model: Any = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=dtype, device_map={"": device}, quantization_config=quantization, attn_implementation="sdpa"
    )
    targets = head.with_targets(lora.config(), model.config)
    if compute.checkpoint_activations in (True, "all"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, targets).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    meter.loaded()
    for batch in batches:
        meter.step_begins()
        inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        with torch.autocast(device.type, dtype, enabled=precision.endswith("mixed")):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.step_ended(loss.detach())


if __name__ == "__main__":
    sys.exit(run_recipe(main))
