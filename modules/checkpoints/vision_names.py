"""Names of the weights of vision-language models, in the one form that transformers 5 gives its modules.

Checkpoints keep the names of the version that wrote them: those on the hub, and what ``save_pretrained`` writes of a
model that was loaded from one, put the language model elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

#: Names of the language model's embedding, in a language model and in vision-language models.
EMBEDDINGS = (
    "model.embed_tokens.weight", "model.language_model.embed_tokens.weight", "model.text_model.embed_tokens.weight",
)  # fmt: skip

_LLAVA = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.model\.", "model.language_model."),
    (r"^(language_model|vision_tower|multi_modal_projector)\.", r"model.\1."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)

_QWEN = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)

#: By ``model_type``: regular expressions and what replaces them, in order.
_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "llava": _LLAVA,
    "gemma3": _LLAVA,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "idefics3": (),
    "smolvlm": (),
}


def renamed(model_type: str | None, names: Mapping[str, str]) -> dict[str, str] | None:
    """``names`` with the values brought into one form; ``None`` for a model without vision."""
    if model_type not in _RENAMES:
        return None
    found = dict(names)
    for key, name in names.items():
        for pattern, replacement in _RENAMES[model_type]:
            name = re.sub(pattern, replacement, name)
        found[key] = name
    return found
