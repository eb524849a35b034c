"""Placeholders, spans and labels of chats with images: token by token, and what is refused or shrunk."""

import re
from pathlib import Path
from typing import Any

import pytest

from lightning_qlora.modules.data.image_processing import ImageProcessing
from lightning_qlora.modules.data.image_processors import load_image_processing, with_chat_template
from lightning_qlora.modules.data.image_rows import IMAGE
from lightning_qlora.modules.data.image_template import ImageLimits, TokenizedImageChats, tokenize_image_chats
from lightning_qlora.modules.data.images import ImageTable, stored_image
from lightning_qlora.modules.data.samples import IGNORE_INDEX
from tests.chats import CHATML
from tests.vision import save_images, save_vision_model

SIZES = {"a.png": (40, 40), "b.png": (80, 40)}  # in the tiny Qwen 5 x 5 and 10 x 5 tokens


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageTable, list[str]]:
    folder = tmp_path_factory.mktemp("images")
    save_images(folder, SIZES)
    table = ImageTable()
    return table, [str(found) for found in table.check([stored_image(name, folder) for name in SIZES])]


def processing_of(folder: Path, name: str, chat_template: str | None = None) -> ImageProcessing:
    config, tokenizer = save_vision_model(folder / name, name)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return load_image_processing(folder / name, config, tokenizer)


def chat(*contents: str, images: list[str]) -> Any:
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)],
        "images": images,
    }


def tokenize(processing: ImageProcessing, table: Any, *chats: Any, seq_len: int = 500, **options: Any) -> Any:
    return tokenize_image_chats(processing, chats, table[0], seq_len, **options)


def test_two_turns_with_images_token_by_token(table, tmp_path):
    processing = processing_of(tmp_path, "qwen2_vl")
    a, b = table[1]
    made: TokenizedImageChats = tokenize(
        processing, table, chat(f"is {IMAGE} a {IMAGE}?", "no", f"{IMAGE}\nand?", "yes it is", images=[a, b, a])
    )
    (sample,) = made.samples
    tokenizer = processing.tokenizer
    image = {n: "<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>" for n in (25, 50)}
    pieces = [
        (f"<|im_start|>user\nis {image[25]} a {image[50]}?<|im_end|>\n<|im_start|>assistant\n", False),
        ("no<|im_end|>", True),
        (f"\n<|im_start|>user\n{image[25]}\nand?<|im_end|>\n<|im_start|>assistant\n", False),
        ("yes it is<|im_end|>", True),
        ("\n", False),
    ]
    ids, labels = [], []
    for text, trained in pieces:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if trained else [IGNORE_INDEX] * len(tokens)
    assert sample["input_ids"] == ids
    assert sample["labels"] == labels
    assert sample["images"] == [0, 1, 0]
    assert sample["max_sides"] == [None, None, None]
    assert sample["cost"] == len(ids) + 4 * 100  # four patches a token
    assert made.image_tokens == [100]
    assert made.turn_ends == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_the_image_after_the_last_trained_turn_is_not_read(table, tmp_path):
    processing = processing_of(tmp_path, "llava")
    (sample,) = tokenize(processing, table, chat(f"{IMAGE}?", "no", f"{IMAGE}!", images=table[1])).samples
    assert sample["images"] == [0]
    assert sample["input_ids"].count(processing.image_token_id) == 9


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "idefics3", "llava", "mllama", "pixtral"])
def test_a_template_of_texts_gets_the_placeholder_in_the_text(name, table, tmp_path, said):
    """The same tokens as from a template that knows image parts."""
    conversation = chat(f"what is {IMAGE}?", "a thing", images=table[1][:1])
    found = []
    for template in (None, CHATML):
        processing = processing_of(tmp_path, name, template)
        found.append(tokenize(processing, table, conversation).samples)
    assert found[0] == found[1]
    assert "The chat template writes nothing for an image" in "".join(said)


def test_each_role_is_written_as_its_template_takes_it(table, tmp_path):
    """As Llama 3.2 Vision's: parts for the user, a text for the system."""
    template = (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content']|trim %}"
        "{% set messages = messages[1:] %}<|im_start|>{{ system }}<|im_end|>\n{% endif %}"
    ) + processing_of(tmp_path, "mllama").tokenizer.chat_template
    processing = processing_of(tmp_path, "mllama", template)
    conversation = chat(f"{IMAGE}what?", "a thing", images=table[1][:1])
    conversation["messages"].insert(0, {"role": "system", "content": "be brief"})
    (sample,) = tokenize(processing, table, conversation).samples
    text = processing.tokenizer.decode(sample["input_ids"])
    assert text.startswith("<|im_start|>be brief<|im_end|>\n<|im_start|>user\n<|image|>what?<|im_end|>")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (["what is <|image_pad|>?", "a thing"], "message 1 (user): its text holds '<|image_pad|>', which stands for"),
        (["what?", "<|vision_start|> it is"], "message 2 (assistant): its text holds '<|vision_start|>'"),
    ],
)
def test_written_image_tokens_are_refused(contents, message, table, tmp_path):
    processing = processing_of(tmp_path, "qwen2_vl")
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenize(processing, table, chat(*contents, images=[]))


def test_a_template_that_drops_an_image_is_refused(table, tmp_path):
    template = processing_of(tmp_path, "llava").tokenizer.chat_template.replace(
        "<image>", "{% if loop.first %}<image>{% endif %}"
    )
    processing = processing_of(tmp_path, "llava", template)
    with pytest.raises(ValueError, match="the chat has 2 images, but the chat template wrote <image> 1 times"):
        tokenize(processing, table, chat(f"{IMAGE} or {IMAGE}?", "no", images=table[1]))


def test_without_a_chat_template(table, tmp_path):
    config, tokenizer = save_vision_model(tmp_path / "model", "llava")
    template, tokenizer.chat_template = tokenizer.chat_template, None
    processing = load_image_processing(tmp_path / "model", config, tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has no chat template, so it is unknown how turns are written"):
        tokenize(processing, table, chat(f"{IMAGE}?", "no", images=table[1][:1]))
    (tmp_path / "model" / "chat_template.json").write_text(f'{{"chat_template": "{CHATML}"}}'.replace("\n", "\\n"))
    assert with_chat_template(tmp_path / "model", tokenizer).chat_template == CHATML
    assert tokenizer.chat_template is None
    assert template != CHATML


def test_the_end_is_cut_but_never_an_image(table, tmp_path):
    """Before each length at which an image begins and after each at which it ends the sample is cut there."""
    processing = processing_of(tmp_path, "qwen2_vl")
    conversation = chat(f"{IMAGE}?", "no", f"{IMAGE}and?", "yes", images=table[1])
    (whole,) = tokenize(processing, table, conversation).samples
    ids = whole["input_ids"]
    first, second = ids.index(processing.image_token_id), len(ids) - ids[::-1].index(processing.image_token_id) - 50
    for seq_len in range(first + 25, len(ids) + 1):
        kept = [end <= seq_len for end in (first + 25, second + 50)]
        if second < seq_len < second + 50:
            message = f"seq_len={seq_len} would cut the sample of {len(ids)} tokens inside its image 2; raise seq_len"
            with pytest.raises(ValueError, match=message):
                tokenize(processing, table, conversation, seq_len=seq_len)
            continue
        if seq_len < ids.index(processing.tokenizer.convert_tokens_to_ids("<|im_end|>"), first + 30):
            continue  # nothing of an answer is left
        (sample,) = tokenize(processing, table, conversation, seq_len=seq_len).samples
        assert sample["input_ids"] == ids[:seq_len]
        assert sample["labels"] == whole["labels"][:seq_len]
        assert len(sample["images"]) == sum(kept)
        assert sample["input_ids"].count(processing.image_token_id) == 25 * kept[0] + 50 * kept[1]


@pytest.mark.parametrize("name", ["qwen2_vl", "pixtral", "idefics3"])
def test_images_are_shrunk_until_they_fit(name, table, tmp_path):
    processing = processing_of(tmp_path, name)
    conversation = chat(f"{IMAGE}and {IMAGE}?", "no", images=table[1])
    (whole,) = tokenize(processing, table, conversation).samples
    seq_len = len(whole["input_ids"]) * 2 // 3
    shrink = ImageLimits(oversized="shrink")
    made = tokenize(processing, table, conversation, seq_len=seq_len, limits=shrink)
    (sample,) = made.samples
    assert len(sample["images"]) == 2
    assert made.num_shrunk >= 1 or name == "idefics3"  # which are enlarged less
    pixels = processing.pixels(
        [[(table[0].load(i, side), side) for i, side in zip(sample["images"], sample["max_sides"], strict=True)]]
    )
    tokens = sample["input_ids"].count(processing.image_token_id)
    counted = {
        "qwen2_vl": lambda: int(pixels["image_grid_thw"].prod(1).sum()) // 4,
        "pixtral": lambda: int((pixels["image_sizes"] // 8).prod(1).sum()),
        "idefics3": lambda: 4 * pixels["pixel_values"].shape[1],
    }[name]()
    assert tokens == counted < whole["input_ids"].count(processing.image_token_id)
    first = sample["input_ids"].index(processing.image_token_id) + 2
    with pytest.raises(ValueError, match=r"inside its image 1, even with images of \d+ pixels; raise seq_len"):
        tokenize(processing, table, conversation, seq_len=first, limits=shrink)


def test_images_of_a_fixed_size_cannot_be_shrunk(table, tmp_path):
    processing = processing_of(tmp_path, "llava")
    conversation = chat(f"{IMAGE}?", "no", images=table[1][:1])
    (whole,) = tokenize(processing, table, conversation).samples
    inside = whole["input_ids"].index(processing.image_token_id) + 2
    with pytest.raises(ValueError, match="images of this model take as many tokens whatever their size; raise seq_len"):
        tokenize(processing, table, conversation, seq_len=inside, limits=ImageLimits(oversized="shrink"))


def test_limits_of_side_and_area():
    assert ImageLimits().side(4000, 3000) is None
    assert ImageLimits(max_side=1000).side(4000, 3000) == 1000
    assert ImageLimits(max_pixels=1_000_000).side(4000, 2500) == 1264
    assert ImageLimits(max_side=900, max_pixels=1_000_000).side(4000, 2500) == 900


def test_a_cut_that_leaves_nothing_to_learn(table, tmp_path):
    processing = processing_of(tmp_path, "llava")
    with pytest.raises(ValueError, match="seq_len=30 cuts away the completion of all 1 samples"):
        tokenize(processing, table, chat(f"{IMAGE}" + "what? " * 9, "no", images=table[1][:1]), seq_len=30)
