r"""Finetune a vision-language model with QLoRA on chats with images.

    python recipes/vision_qlora.py
    python recipes/vision_qlora.py --devices 2 --model Qwen/Qwen2.5-VL-7B-Instruct --dataset chats.jsonl \
        --max_image_size 1024 --compile default

The language model is held in 4 bits and adapted with LoRA; --vision_lora adapts the vision tower too, and
--projector full trains the projector between them, which is saved with the adapter. Families: Llava 1.5, Pixtral (in
Llava's form), Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Idefics3, SmolVLM, Gemma 3.

Rows are chats whose messages hold images as paths, file:// URLs or base64, LLaVA's conversations with <image>, or
tables with image columns; text-only rows may be among them. Images are decoded once before training, and their tokens
are counted and shown. Nothing is fetched from a network for an image.

Without flags it teaches SmolLM2-135M to read handwritten digits: a vision tower trained on the spot in front of it, a
projector with random weights, and images that scikit-learn brings (pip install lightning-qlora[yardstick]). No GPU and
no model hub needed: 4 minutes of one CPU core and 2 GiB, in which exactly right answers to held-out images rise from
none to 88 %. On a GPU take --max_steps 600 --batch_size 32 --val_samples 400.

Prints how many held-out answers are exactly right before and after. Writes report.json and report.html, a peft adapter
and resumable checkpoints to --output_dir. --dry_run predicts the memory of each GPU and ends. Ctrl-C saves a
checkpoint; --resume goes on from the latest.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import lightning.pytorch as L

from lightning_qlora.callbacks import (
    CompareAnswers,
    CompileReport,
    ExactMatch,
    GracefulStop,
    LossProgress,
    MemoryReport,
    RunReport,
    SaveAdapter,
    StepCheckpoint,
    ThroughputReport,
)
from lightning_qlora.modules.attention import choose_attention
from lightning_qlora.modules.checkpoints.chat_format import ChatFormat
from lightning_qlora.modules.checkpoints.demo_vision_model import DEMO_VISION_MODEL, demo_vision_model_directory
from lightning_qlora.modules.checkpoints.resolve import ModelOptions, base_name
from lightning_qlora.modules.cli import Only, as_metadata, run_recipe
from lightning_qlora.modules.data.digits import DIGITS, digit_images
from lightning_qlora.modules.data.options import BatchOptions, DataOptions
from lightning_qlora.modules.data.vision import ImageOptions, VisionDataModule
from lightning_qlora.modules.distributed.strategies import StrategyOptions, build_strategy
from lightning_qlora.modules.distributed.trained_checkpoints import CheckpointOptions
from lightning_qlora.modules.hardware import capabilities, compute_dtype
from lightning_qlora.modules.lora.config import LoraOptions
from lightning_qlora.modules.models.families import attention_request, load_config
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.models.vision_language import VisionLanguageHead, VisionOptions
from lightning_qlora.modules.training.options import OptimizationOptions, RunOptions
from lightning_qlora.modules.training.run_directory import RunDirectory
from lightning_qlora.modules.training.run_plan import plan_run
from lightning_qlora.modules.training.vision_language import QLoRAVisionLanguage


def main(
    model: ModelOptions = ModelOptions(DEMO_VISION_MODEL),
    data_options: DataOptions = DataOptions(DIGITS, val_samples=96, show_samples=1),
    images: ImageOptions = ImageOptions(),
    vision: VisionOptions = VisionOptions(projector="full"),
    batch: Annotated[BatchOptions, Only("batch_size", "accumulate", "seq_len")] = BatchOptions(
        batch_size=16, seq_len=512
    ),
    optimization: OptimizationOptions = OptimizationOptions(max_steps=40, lr=1e-3),
    lora: LoraOptions = LoraOptions(lora_r=16),
    strategy: StrategyOptions = StrategyOptions(),
    compute: ComputeOptions = ComputeOptions(),
    checkpoints: CheckpointOptions = CheckpointOptions(),
    run: RunOptions = RunOptions(Path("runs/vision_qlora")),
) -> int:
    """Train, evaluate, report and save; returns the exit status. The flags are the fields of these classes."""
    flags = as_metadata(locals())  # nothing else is local yet
    strategy = strategy.check()
    files = RunDirectory(run.output_dir)
    checkpoint = files.begin(run, flags)
    device = capabilities()
    if model.model == DEMO_VISION_MODEL:
        model = ModelOptions(str(demo_vision_model_directory(*digit_images("train"))))
    directory = model.directory()
    config = load_config(directory, vision=True)
    choose_attention(  # refuses what it cannot do, before anything long
        compute.attention,
        attention_request(
            config, packed=False, sliding_window=compute.sliding_window,
            compute_capability=device.compute_capability, dtype=compute_dtype(strategy.precision),
        ),
    )  # fmt: skip
    chat_format = ChatFormat.of(directory, lora.init_adapter)
    data = VisionDataModule(
        directory, config, chat_format.tokenizer, data_options, images, batch_size=batch.batch_size,
        seq_len=batch.seq_len, seed=optimization.seed,
    )  # fmt: skip
    data.load()
    planned = plan_run(
        config, lora.config(), strategy, compute, batch_size=batch.batch_size, seq_len=batch.seq_len,
        accumulate=batch.accumulate, device=device, head=VisionLanguageHead.of(config, vision),
        image_patches=data.image_patches,
    )  # fmt: skip
    strategy, compute, plan = planned.strategy, planned.compute, planned.memory
    if (status := planned.announce(dry_run=run.dry_run)) is not None:
        return status
    optimization = optimization.in_steps(data.steps_per_epoch(strategy.world_size, batch.accumulate))
    module = QLoRAVisionLanguage(
        directory, lora.config(), vision=vision, loss=optimization.loss, learning_rate=optimization.lr,
        warmup_steps=optimization.warmup_steps, compute=compute, init_adapter=lora.init_adapter,
        model_name=base_name(model.model, directory), seed=optimization.seed,
    )  # fmt: skip
    module.check_checkpoint(checkpoint)
    module.chat_format = chat_format.trained(directory, data.tokenizer, data.turn_ends)

    stop = GracefulStop(files.checkpoints)
    trainer = L.Trainer(
        devices=strategy.devices, num_nodes=strategy.num_nodes, strategy=build_strategy(strategy, checkpoints),
        max_steps=optimization.max_steps, accumulate_grad_batches=batch.accumulate,
        gradient_clip_val=optimization.clip_norm,
        val_check_interval=max(1, data.batches_in(optimization.max_steps, strategy.world_size, batch.accumulate)),
        check_val_every_n_epoch=None, num_sanity_val_steps=0, inference_mode=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            ExactMatch(),
            *([CompareAnswers([(run.prompt, None)])] if run.prompt else []),
            LossProgress(),
            SaveAdapter(files.adapter),
            MemoryReport(predicted=plan.parts if device.device_type == "cuda" else None),
            ThroughputReport(),
            *([CompileReport()] if compute.compile != "off" else []),
            RunReport(files.report, html=True, metadata=flags | planned.metadata),
            StepCheckpoint(files.checkpoints, checkpoints.save_every, adapters=files.adapters),
            stop,
        ],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=checkpoint)
    files.release()
    if trainer.is_global_zero and not stop.exit_code:
        export = f"python recipes/export_gguf.py --adapter {files.adapter} --type q8_0 --output {files.root}/model.gguf"
        print(f"To run it in llama.cpp: {export}", flush=True)
    return stop.exit_code


if __name__ == "__main__":
    sys.exit(run_recipe(main))
