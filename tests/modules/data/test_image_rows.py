"""Rows with images in every form become chats with a mark for each image, in order."""

import re
from pathlib import Path
from typing import Any

import pytest

from lightning_qlora.modules.data.image_rows import IMAGE, to_image_chat

ANSWER = {"role": "assistant", "content": "a cat"}


def parts(*contents: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", **c} for c in contents]


def user(*contents: Any) -> dict[str, Any]:
    return {"role": "user", "content": parts(*contents)}


A, B = {"path": "a.png"}, {"path": "b.png"}


@pytest.mark.parametrize(
    ("row", "text", "paths"),
    [
        ({"messages": [user(A, "what?"), ANSWER]}, f"{IMAGE}what?", "a"),
        ({"messages": [user("first ", A, " then ", B, "?"), ANSWER]}, f"first {IMAGE} then {IMAGE}?", "ab"),
        ({"messages": [user("what?"), ANSWER]}, "what?", ""),
        ({"messages": [{"role": "user", "content": "what?"}, ANSWER]}, "what?", ""),
        ({"messages": [user({}, "what?"), ANSWER], "images": ["a.png"]}, f"{IMAGE}what?", "a"),
        ({"messages": [user(B, {}, "what?"), ANSWER], "image": "a.png"}, f"{IMAGE}{IMAGE}what?", "ba"),
        ({"conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}],
          "image": "a.png"}, f"{IMAGE}what?", "a"),
        ({"conversations": [{"from": "human", "value": "is <image>\n<image> ?"}, {"from": "gpt", "value": "a cat"}],
          "image": ["a.png", "b.png"]}, f"is {IMAGE}{IMAGE} ?", "ab"),
        ({"conversations": [{"from": "human", "value": "what is HTML's <image>?"}, {"from": "gpt", "value": "a cat"}]},
         "what is HTML's <image>?", ""),
        ({"question": "what?", "answer": "a cat", "image": {"path": "a.png", "bytes": None}}, f"{IMAGE}what?", "a"),
        ({"question": "what?", "answer": "a cat", "images": ["a.png", "b.png"]}, f"{IMAGE}{IMAGE}what?", "ab"),
        ({"instruction": "compare <image>", "input": "<image>", "output": "a cat", "images": ["a.png", "b.png"]},
         f"compare {IMAGE}\n\n{IMAGE}", "ab"),
        ({"prompt": [user({}, "what?")], "completion": [ANSWER], "images": ["a.png"]}, f"{IMAGE}what?", "a"),
        ({"messages": '[{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a cat"}]',
          "image": "a.png"}, f"{IMAGE}what?", "a"),
        ({"messages": [user("what?"), ANSWER], "image": None}, "what?", ""),
    ],
)  # fmt: skip
def test_forms(row: dict[str, Any], text: str, paths: str) -> None:
    unused: dict[str, None] = {}
    chat, images = to_image_chat(row, unused, Path("/data"))
    assert [message["content"] for message in chat["messages"]] == [text, "a cat"]
    assert [image.path for image in images] == [f"/data/{letter}.png" for letter in paths]
    assert not unused


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [user({}, {}, "?"), ANSWER], "images": ["a.png"]}, "there are 2 places for the 1 images"),
        ({"messages": [user({}, "?"), ANSWER], "images": ["a.png", "b.png"]}, "there are 1 places for the 2 images"),
        ({"messages": [user({}, "?"), ANSWER], "images": []}, "there are 1 places for the 0 images"),
        ({"messages": [user({}, "?"), ANSWER]}, "message 1: an image must be given as path"),
        ({"messages": [user("?"), {"role": "assistant", "content": parts(A, "this")}]},
         "message 2 (assistant): an answer holds an image, which cannot be learned here"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}, ANSWER]},
         "message 1: the content must be text and images, found {'type': 'video'"),
        ({"messages": [user(f"x{IMAGE}"), ANSWER]}, "a text holds the character '\\ue002' (U+E002)"),
        ({"messages": [user({"url": "https://example.org/a.png"}, "?"), ANSWER]}, "over the network"),
        (["no row"], "expected an object with fields, found list"),
    ],
)  # fmt: skip
def test_what_is_refused(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        to_image_chat(row, {}, Path())
