"""Data in: sources, chat templates with the loss on completions, packing, batches, and an order that can resume."""

from typing import TYPE_CHECKING

from ..lazy import import_on_first_use

if TYPE_CHECKING:
    from .chat_template import tokenize_chats
    from .classification import ClassificationDataModule, ClassificationDataOptions
    from .collators import ChatCollator, PackedCollator, join_samples
    from .data_module import ChatDataModule
    from .loader import ResumableDataLoader
    from .options import BatchOptions, DataOptions
    from .packing import pack_samples
    from .preference import PreferenceDataModule, PreferenceDataOptions
    from .sampler import GlobalBatchSampler
    from .samples import IGNORE_INDEX, Batch, Chat, Collator, Message, PackedBatch, Sample
    from .sources import load_chats
    from .vision import ImageOptions, VisionDataModule
    from .vocabulary import choose_pad_token_id
else:
    __getattr__, __dir__ = import_on_first_use(__name__)

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "BatchOptions",
    "Chat",
    "ChatCollator",
    "ChatDataModule",
    "ClassificationDataModule",
    "ClassificationDataOptions",
    "Collator",
    "DataOptions",
    "GlobalBatchSampler",
    "ImageOptions",
    "Message",
    "PackedBatch",
    "PackedCollator",
    "PreferenceDataModule",
    "PreferenceDataOptions",
    "ResumableDataLoader",
    "Sample",
    "VisionDataModule",
    "choose_pad_token_id",
    "join_samples",
    "load_chats",
    "pack_samples",
    "tokenize_chats",
]
