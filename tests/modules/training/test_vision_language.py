"""The LightningModule of vision-language models: ranks with images and without, files that stock peft reads."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.lora.adapter_files import save_adapter
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.models.build import build_model
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.models.vision_language import VisionOptions
from lightning_qlora.modules.training.vision_language import QLoRAVisionLanguage
from tests.distributed import RankPools, build
from tests.vision_models import batch_of, save

pytestmark = pytest.mark.usefixtures("one_thread")

#: Images of the two rows of each micro-batch, two micro-batches a step: in the last, no rank has any.
IMAGES = ([2, 1], [0, 0], [0, 0], [0, 1], [0, 0], [0, 0])

VISION = VisionOptions(vision_lora=True, projector="full")


class Watch(Callback):
    """Losses of all steps, and what a batch holds."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.held: list[set[str]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self.held.append(set(batch))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == len(self.losses) + 1:
            self.losses.append(float(trainer.callback_metrics["train_loss"]))


def run(directory: Path, name: str, adapter: Path, strategy: str = "auto", **options: Any) -> dict[str, Any]:
    """Train three steps, each on two micro-batches, and return losses and what batches held on this rank."""
    devices = torch.distributed.get_world_size() if strategy != "auto" else 1
    rank = torch.distributed.get_rank() if devices > 1 else 0
    batches = [batch_of(name, images, seed=number) for number, images in enumerate(IMAGES)]
    mine = batches[rank::devices]
    defaults = {"lora": default_lora(4), "vision": VISION, "compute": ComputeOptions(checkpoint_activations="all")}
    module = QLoRAVisionLanguage(directory, learning_rate=1e-2, schedule="constant", **{**defaults, **options})
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, max_steps=3, accumulate_grad_batches=2 // devices,
        strategy=strategy if strategy == "auto" else build(strategy, devices=devices), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, inference_mode=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, callbacks=[watch], gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(mine, batch_size=None))
    module.save_adapter(adapter)
    return {"losses": watch.losses, "held": watch.held, "flops": module.flops_per_token(40)}


def on_ranks(directory: Path, name: str, adapter: Path, strategy: str, vision: VisionOptions) -> dict[str, Any]:
    return run(directory, name, adapter, strategy, vision=vision)


@pytest.mark.parametrize(
    ("strategy", "vision"), [("fsdp2", VISION), ("ddp", VISION), ("fsdp2", VisionOptions())],
    ids=["fsdp2", "ddp", "fsdp2-frozen-tower"],
)  # fmt: skip
def test_two_ranks_train_as_one_where_one_of_them_has_no_images(strategy, vision, ranks: RankPools, tmp_path):
    """With all layers recomputed, and the tower's blocks."""
    directory = save(tmp_path / "model", "qwen2_5_vl")
    one = run(directory, "qwen2_5_vl", tmp_path / "one", vision=vision)
    two = ranks.run(2, "cpu", on_ranks, directory, "qwen2_5_vl", tmp_path / "two", strategy, vision, timeout=300)
    for rank in two:
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert one["losses"][-1] != pytest.approx(one["losses"][0], rel=1e-2)
    first, second = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("one", "two"))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=1e-3, atol=1e-4, msg=key)
    # Positions are made on the host; a mask that only pads on the right is not needed.
    images, text = one["held"][:2]
    assert {"position_ids", "num_image_tokens", "image_grid_thw"} <= images
    assert "attention_mask" not in images | text
    assert not {"pixel_values", "num_image_tokens"} & text


def test_by_default_only_the_language_model_is_adapted_and_continued_from(tmp_path, tiny_llama_dir):
    directory = save(tmp_path / "model", "llava")
    found = run(directory, "llava", tmp_path / "adapter", vision=VisionOptions())
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 7
    assert all(".language_model.layers." in key for key in saved), "CLIP's projections have the same names"
    assert found["flops"] > 0
    again = QLoRAVisionLanguage(directory, init_adapter=tmp_path / "adapter")
    assert again.lora.r == 4
    with pytest.raises(ValueError, match=r"modules that were trained in full \(none\), this run trains multi_modal"):
        QLoRAVisionLanguage(directory, init_adapter=tmp_path / "adapter", vision=VisionOptions(projector="full"))
    model = build_model(SafetensorsCheckpoint(tiny_llama_dir), default_lora(4))
    save_adapter(model.to_empty(device="cpu"), tmp_path / "text", default_lora(4), "text")
    with pytest.raises(ValueError, match=r"made for a language model alone.*model\.language_model"):
        QLoRAVisionLanguage(directory, init_adapter=tmp_path / "text")
    wants_more = VisionOptions(vision_lora=True)
    with pytest.raises(ValueError, match=r"The vision tower \(--vision_lora\) is to be adapted, but LoRA target_mod"):
        run(directory, "llava", tmp_path / "none", vision=wants_more, init_adapter=tmp_path / "adapter", lora=None)
    with pytest.raises(ValueError, match="the projector of Gemma3 has no linear layers"):
        QLoRAVisionLanguage(
            save(tmp_path / "gemma3", "gemma3"), default_lora(4), vision=VisionOptions(projector="lora")
        )


def test_its_hyperparameters_build_it_again(tmp_path):
    module = QLoRAVisionLanguage(save(tmp_path, "llava"), default_lora(4), vision=VISION)
    again = QLoRAVisionLanguage(**{name: module.hparams[name] for name in ("model_dir", "lora", "vision", "compute")})
    assert (again.vision, again.compute) == (VISION, module.compute)
    assert again.lora.to_dict() == module.lora.to_dict()
