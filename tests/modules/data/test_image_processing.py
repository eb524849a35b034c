"""Batches equal those of each family's stock processor; what images take follows from their size."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig
from transformers.models.pixtral import image_processing_pil_pixtral

from lightning_qlora.modules.data.image_processors import load_image_processing
from lightning_qlora.modules.data.options import DataOptions
from lightning_qlora.modules.data.vision import VisionDataModule
from tests.chats import make_tokenizer, write
from tests.vision import FAMILIES, save_images, save_vision_model

SIZES = {"wide.png": (100, 40), "tall.png": (30, 70), "small.png": (20, 16)}


def stock_processor(name: str, image_processor: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    family = FAMILIES[name]
    package = "pixtral" if name == "pixtral" else family.model_type
    if name == "pixtral":  # its file asks the torchvision variant for a function that both have
        monkeypatch.setitem(
            sys.modules, "transformers.models.pixtral.image_processing_pixtral", image_processing_pil_pixtral
        )
    module = importlib.import_module(f"transformers.models.{package}.processing_{package}")
    kind = next(
        value for key, value in vars(module).items()
        if key.endswith("Processor") and getattr(value, "__module__", "") == module.__name__
    )  # fmt: skip
    if name == "smolvlm":
        monkeypatch.setattr(module, "num2words", str)  # of videos' texts
    tokenizer.bos_token = "<|im_start|>"  # Mllama's writes it before texts that do not hold it
    if name == "mllama":  # in 5.17 it refused text-only samples in a batch with images
        monkeypatch.setattr(kind, "validate_inputs", lambda *_, **__: None)
    if name == "gemma3":
        tokenizer.image_token, tokenizer.boi_token, tokenizer.eoi_token = family.tokens
        tokenizer.image_token_id, tokenizer.boi_token_id = tokenizer.convert_tokens_to_ids(list(family.tokens[:2]))
    options: dict[str, Any] = {
        "llava": {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        "llava-siglip": {"patch_size": 8, "vision_feature_select_strategy": "full"},
        "pixtral": {"patch_size": 8},
        "gemma3": {"image_seq_length": 4},
    }.get(name, {})
    if "idefics" in name or name == "smolvlm":
        options = {"image_seq_len": 4}
    if "video_processor" in kind.get_attributes():
        # Real ones need torchvision. What stands here is asked for the names of its inputs alone.
        monkeypatch.setattr(kind, "check_argument_for_proper_class", lambda *_: None)
        options["video_processor"] = SimpleNamespace(model_input_names=[])
    return kind(image_processor, tokenizer, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mixed_batch_is_the_stock_processors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tokenizer = save_vision_model(tmp_path / "model", name)
    save_images(tmp_path, SIZES)
    chats = [["wide.png", "small.png"], [], ["tall.png"]]
    messages = [
        [
            {"role": "user", "content": [
                *({"type": "image", "path": path} for path in paths), {"type": "text", "text": f"what {number}?"}
            ]},
            {"role": "assistant", "content": "hello " * (1 + 3 * number)},
        ]
        for number, paths in enumerate(chats)
    ]  # fmt: skip
    data = VisionDataModule(
        tmp_path / "model", config, tokenizer,
        DataOptions(str(write(tmp_path / "chats.jsonl", *({"messages": each} for each in messages)))),
        batch_size=3, seq_len=1000, pad_to_multiple_of=1,
    )  # fmt: skip
    data.load()
    samples = [data.train_set[index] for index in range(3)]
    batch = data.collator(samples)

    stock = stock_processor(name, data.processing.image_processor, tokenizer, monkeypatch)
    texts = [tokenizer.apply_chat_template(each, tokenize=False) for each in messages]
    cut = ["".join(text.rpartition("<|im_end|>")[:2]) + "\n" for text in texts]
    images = [[Image.open(tmp_path / path) for path in paths] for paths in chats]
    nested = name in ("idefics3", "smolvlm", "gemma3", "mllama")
    flat = [image for each in images for image in each]
    expected = stock(
        text=cut, images=images if nested else flat, return_tensors="pt", padding=True, add_special_tokens=False
    )
    assert set(batch) - set(expected) == {"labels", "num_tokens", "num_loss_tokens"}
    for key, value in expected.items():
        assert torch.equal(batch[key], torch.as_tensor(value)), key
        assert batch[key].dtype == torch.as_tensor(value).dtype, key
    # Labels: the answer and its end, and nothing else; counted from the words, not from what is tested.
    for row, text, number in zip(batch["labels"], texts, range(3), strict=True):
        learned = tokenizer.decode(row[row != -100])
        assert learned == "hello " * (1 + 3 * number) + "<|im_end|>"
        assert text.count(learned) == 1
    marks = list(data.processing.never_trained)
    assert not torch.isin(batch["labels"], torch.tensor(marks)).any()
    assert batch["num_loss_tokens"] == int((batch["labels"][:, 1:] != -100).sum())

    alone = data.collator([samples[1]])
    assert not {key for key in alone if "pixel" in key or "image_" in key or "aspect" in key or "cross" in key}
    expected = stock(text=cut[1:2], return_tensors="pt", add_special_tokens=False)
    assert set(alone) - set(expected) == {"labels", "num_tokens", "num_loss_tokens"}
    assert all(torch.equal(alone[key], expected[key]) for key in set(alone) & set(expected))
    assert data.image_figures()["samples_with_images"] == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_follow_from_the_size_alone(name: str, tmp_path: Path) -> None:
    """What is counted for a size is what the image processor makes of it, limited or not."""
    config, tokenizer = save_vision_model(tmp_path / "model", name)
    processing = load_image_processing(tmp_path / "model", config, tokenizer)
    for width, height, side in [(1, 1, None), (64, 64, None), (97, 33, None), (33, 95, 64), (31, 7, 20), (200, 20, 70)]:
        image = Image.new("RGB", (width, height), (9, 9, 9))
        pixels = processing.pixels([[(image, side)]])
        expansion = processing.expansion(width, height, side)
        count = expansion.count(processing.image_token)
        if "image_grid_thw" in pixels:
            assert count == int(pixels["image_grid_thw"].prod()) // 4
            assert processing.cost(width, height, side) == pixels["pixel_values"].shape[0]
        elif "pixel_attention_mask" in pixels:
            assert count == 4 * pixels["pixel_values"].shape[1]
        elif "image_sizes" in pixels:
            tall, wide = (pixels["image_sizes"][0] // 8).tolist()
            assert (count, expansion.count("[IMG_BREAK]"), expansion.count("[IMG_END]")) == (tall * wide, tall - 1, 1)
        elif "num_tiles" in pixels:
            assert count == 1
            assert processing.cost(width, height, side) == pixels["num_tiles"][0][0] * 17
        else:
            assert pixels["pixel_values"].shape[0] == 1
            assert count == {"llava": 9, "llava-siglip": 9, "gemma3": 4}[name]


def test_gemma3_crops_are_counted(tmp_path: Path) -> None:
    config, tokenizer = save_vision_model(tmp_path / "model", "gemma3")
    processing = load_image_processing(tmp_path / "model", config, tokenizer)
    processor = processing.image_processor
    processor.do_pan_and_scan, processor.pan_and_scan_min_crop_size = True, 16
    processor.pan_and_scan_max_num_crops, processor.pan_and_scan_min_ratio_to_activate = 4, 1.2
    pixels = processing.pixels([[(Image.new("RGB", (96, 32)), None)]])
    assert pixels["pixel_values"].shape[0] == 4
    assert processing.expansion(96, 32).count(processing.image_token) == 4 * 4


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    config, tokenizer = save_vision_model(tmp_path / "model", "qwen2_vl")
    with pytest.raises(ValueError, match=r"tokens, and none with the id \d+|lacks"):
        load_image_processing(tmp_path / "model", config, make_tokenizer())
    with pytest.raises(ValueError, match=r"lacks <\|vision_start\|>, <\|vision_end\|>, which stands for images"):
        load_image_processing(tmp_path / "model", config, make_tokenizer(extra=("<|image_pad|>",)))
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="copy preprocessor_config"):
        load_image_processing(tmp_path / "model", config, tokenizer)
    with pytest.raises(ValueError, match="a llama model takes no images here; the known families are llava, qwen2_vl"):
        load_image_processing(tmp_path / "model", LlamaConfig(), tokenizer)
