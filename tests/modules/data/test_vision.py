"""The data module of chats with images: what is read from where, told, refused, and resumed."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer

from lightning_qlora.modules.data.options import DataOptions
from lightning_qlora.modules.data.vision import ImageOptions, VisionDataModule
from tests.chats import write
from tests.vision import save_images, save_vision_model

ANSWER = {"role": "assistant", "content": "a thing"}


def row(*paths: str) -> dict[str, Any]:
    parts = [*({"type": "image", "path": path} for path in paths), {"type": "text", "text": f"what {len(paths)}?"}]
    return {"messages": [{"role": "user", "content": parts}, ANSWER]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and images. Read only."""
    folder = tmp_path_factory.mktemp("vision")
    for name in ("qwen2_5_vl", "llava-siglip"):
        save_vision_model(folder / name, name)
    save_images(folder, {"a.png": (40, 40), "b.png": (80, 40), "large.png": (300, 150)})
    return folder


def module(
    folder: Path, dataset: Path | str, name: str = "qwen2_5_vl", images: ImageOptions | None = None, **options: Any
) -> VisionDataModule:
    shape = {"batch_size": 2, "seq_len": 400} | {
        key: options.pop(key) for key in ("batch_size", "seq_len") if key in options
    }
    directory = folder / name
    return VisionDataModule(
        directory, AutoConfig.from_pretrained(directory), AutoTokenizer.from_pretrained(directory),
        DataOptions(str(dataset), **{"val_samples": 0, **options}), images or ImageOptions(), **shape,
    )  # fmt: skip


def test_what_images_cost_is_told_and_reported(folder: Path, said: list[str]) -> None:
    rotated = Image.open(folder / "a.png").convert("CMYK")
    rotated.save(folder / "cmyk.jpg")
    rows = [row("a.png"), row("a.png", "b.png"), row(), row("large.png"), row("cmyk.jpg")]
    data = module(folder, write(folder / "told.jsonl", *rows), images=ImageOptions(max_image_size=100), show_samples=1)
    data.load()
    assert re.search(
        r"told.jsonl: 5 samples to train on, 0 held out. 4 images \(1 shrunk, 1 in CMYK \(converted to RGB\)\) in 4 "
        r"samples, which take 25 to 75 tokens of a sample, median \d+(\.5)? \(min, median, max: 6%, \d+%, 19% of "
        r"seq_len=400\)",
        "".join(said),
    )
    section = data.report_section()
    assert section is not None
    section = json.loads(json.dumps(section))
    assert (section["images"], section["samples_with_images"], section["images_shrunk"]) == (4, 4, 1)
    assert (section["image_tokens"]["min"], section["image_tokens"]["max"]) == (25, 75)
    assert section["image_changes"] == {"in CMYK (converted to RGB)": 1}
    runs = section["samples"][0]["runs"]
    assert runs[0][0].endswith(
        "<|vision_start|><|image_pad|> x 25 <|vision_end|>what 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert runs[1] == ["a thing<|im_end|>", True]
    assert data.image_patches == 4 * sum(sorted(data.image_tokens)[-2:])  # four patches a token, two samples a batch


def test_directories_of_datasets_and_parquet_give_the_same_batches(folder: Path, tmp_path: Path) -> None:
    questions, files = ["what?", "and?"], [["a.png"], ["b.png", "a.png"]]
    messages = [[{"role": "user", "content": question}, ANSWER] for question in questions]
    plain = write(
        folder / "plain.jsonl",
        *({"messages": m, "images": names} for m, names in zip(messages, files, strict=True)),
    )
    table = datasets.Dataset.from_dict(
        {"messages": messages, "images": [[str(folder / name) for name in names] for names in files]},
        features=datasets.Features({
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }),
    )  # fmt: skip
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "table.parquet")
    expected = module(folder, plain)
    expected.load()
    batch = next(iter(expected.train_dataloader()))
    for dataset in (tmp_path / "saved", tmp_path / "table.parquet"):
        data = module(folder, dataset)
        data.load()
        found = next(iter(data.train_dataloader()))
        assert found.keys() == batch.keys()
        assert all(torch.equal(torch.as_tensor(found[key]), torch.as_tensor(batch[key])) for key in batch)
        assert data.fingerprint == expected.fingerprint


def test_bad_rows_are_named_or_left_out(folder: Path) -> None:
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "b.png").read_bytes()[:200])
    two = {"messages": [{"role": "user", "content": "<image><image>?"}, ANSWER], "images": ["a.png"]}
    written = {"messages": [{"role": "user", "content": "<|image_pad|>?"}, ANSWER]}
    rows = [row("a.png"), row("empty.png"), row("cut.png"), row("gone.png"), two, written, row("a.png", "empty.png")]
    dataset = write(folder / "bad.jsonl", *rows)
    with pytest.raises(ValueError, match="1 of 7 rows cannot be trained on:\n  line 5: there are 2 places for the 1"):
        module(folder, dataset).load()
    dataset = write(folder / "bad.jsonl", *(each for each in rows if each is not two))
    with pytest.raises(ValueError, match="4 of 6 rows cannot be trained on") as refused:
        module(folder, dataset).load()
    for message in (
        rf"line 2, line 6: the image {folder}/empty.png is empty (0 bytes)",
        rf"line 3: the image {folder}/cut.png cannot be decoded (",
        rf"line 4: the image {folder}/gone.png cannot be read: No such file or directory",
        "Mend or remove them, or leave them out with --skip_bad_rows.",
    ):
        assert message in str(refused.value)
    data = module(folder, write(folder / "bad.jsonl", *rows), skip_bad_rows=True)
    with pytest.warns(UserWarning, match="rows are left out"):
        data.load()
    assert data.num_train == 1


def test_workers_and_this_process_make_the_same_batches(folder: Path) -> None:
    dataset = write(folder / "workers.jsonl", *(row("a.png", "b.png") if i % 3 else row() for i in range(6)))
    here, there = (
        list(module(folder, dataset, images=ImageOptions(image_workers=workers)).train_dataloader())
        for workers in (0, 1)
    )
    assert len(here) == len(there) == 3
    for batch, other in zip(here, there, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(other[key])) for key in batch)


def test_other_pixels_are_other_data(folder: Path, tmp_path: Path) -> None:
    dataset = write(tmp_path / "chats.jsonl", row("image.png"), row())
    states = []
    for color in ("red", "red", "blue"):
        Image.new("RGB", (40, 40), color).save(tmp_path / "image.png")
        data = module(folder, dataset)
        states.append(data.state_dict())
    assert states[0] == states[1]
    with pytest.raises(ValueError, match="the checkpoint's place in the data does not fit this run"):
        data.load_state_dict(states[0])
    data.load_state_dict(states[2])


def test_the_blank_sample_of_a_rank_without_any_has_no_image(folder: Path) -> None:
    data = module(folder, write(folder / "one.jsonl", row("a.png"), row("b.png")))
    data.load()
    assert data.train_set is not None
    batch = data.collator([data.train_set[2]])
    assert batch["num_loss_tokens"] == 0
    assert "pixel_values" not in batch
    mixed = data.collator([data.train_set[2], data.train_set[0]])
    assert mixed["image_grid_thw"].shape == (1, 3)


def test_the_pad_token_is_never_an_image_token(folder: Path) -> None:
    dataset = write(folder / "pad.jsonl", row("a.png"), row())
    data = module(folder, dataset)
    data.tokenizer.pad_token = None
    data.load()
    assert data.collator.pad_token_id not in data.processing.never_trained
    with pytest.raises(ValueError, match=re.escape("--pad_token '<|image_pad|>' stands for something else")):
        module(folder, dataset, pad_token="<|image_pad|>").load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_image_size": 0}, "--max_image_size and --max_image_pixels must be at least 1"),
        ({"max_image_pixels": -4}, "--max_image_pixels must be at least 1, got -4"),
        ({"oversized_images": "cut"}, "--oversized_images must be 'refuse' or 'shrink', got 'cut'"),
        ({"image_workers": -1}, "--image_workers must be at least 0, got -1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageOptions(**options)


def test_digits_are_mixed_with_texts_and_held_out(folder: Path) -> None:
    pytest.importorskip("sklearn")
    data = module(folder, "sklearn-digits", "llava-siglip", val_samples=400, batch_size=4)
    data.load()
    assert data.train_set is not None
    counts = [len(images) for images in data.train_set.rows["images"]]
    assert [counts.count(n) for n in (0, 1, 2)] == [288, 1438, 144]
    assert data.num_val == 359
    held_out = {digest for chat in data.val_chats for digest in chat["images"]}
    used = {data.table.checked[i].digest for images in data.train_set.rows["images"] for i in images}
    assert len(held_out) == 359
    assert not held_out & used
    batch = next(iter(data.val_dataloader()))
    answers = [data.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert [chat["messages"][1]["content"] + "<|im_end|>" for chat in data.val_chats[:4]] == answers
