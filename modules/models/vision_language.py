"""A vision-language model of any family: images become tokens, and the head computes the loss in chunks.

Shapes: B samples, S tokens per sample, images' placeholders included, H hidden size.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..lora.config import is_adapter, with_targets
from .causal_lm import QLoRAForCausalLM, give_loss
from .compilation import CompileMode, compile_region
from .decoder import QLoRADecoder, mixed
from .families import VISION_FAMILIES, Family
from .vision_features import TowerBlock, specialize_tower
from .vision_towers import VisionSide, matches


@dataclass(frozen=True)
class VisionOptions:
    """Vision tower and projector.

    Args:
        vision_lora: Train adapters on the vision tower, as on the language model.
        projector: The projector between tower and language model stays as it is (frozen), gets adapters (lora), or is
            trained in full and saved with the adapter (full).
        quantize_vision: Hold the vision tower's weights in 4 bits even where the checkpoint has them in 16.
    """

    vision_lora: bool = False
    projector: Literal["frozen", "lora", "full"] = "frozen"
    quantize_vision: bool = False


class QLoRAForVisionLanguage(QLoRAForCausalLM):
    """Mixin for a vision-language model of transformers.

    Attributes:
        vision: Its vision side.
        options: What is trained of that.
    """

    compiles_rotary: bool  # type: ignore[misc]
    vision: VisionSide
    options: VisionOptions
    may_also_adapt: ClassVar[str] = ", nor a layer of the vision side that may be adapted"

    @property
    def decoder(self) -> Any:
        """The language model: embed_tokens, layers, norm, rotary_emb."""
        return self.model.get_submodule(self.vision.language_model)

    # --- forward -----------------------------------------------------------------------------------------------------

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        num_loss_tokens: int | None = None,
        document_lengths: list[list[int]] | None = None,
        loss_inputs: tuple[Tensor, ...] = (),
        num_image_tokens: int | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' forward, but with ``labels`` [B, S] no logits are returned; see :class:`QLoRAForCausalLM`.

        Images come as the family's processor makes them: ``pixel_values`` of all samples in order, and what the family
        has beside it. A batch without images has none of them. ``num_image_tokens``, how many of ``input_ids`` are
        placeholders, spares a wait for the device.

        Raises:
            ValueError: If placeholders are not as many as the images' tokens, the family does not take one of the
                inputs, or ``document_lengths`` are given with images where positions or attention depend on them.
        """
        given = {
            "pixel_values": pixel_values, "image_grid_thw": image_grid_thw, "image_sizes": image_sizes,
            "pixel_attention_mask": pixel_attention_mask, "mm_token_type_ids": mm_token_type_ids,
            "token_type_ids": token_type_ids,
        }  # fmt: skip
        images = {name: value for name, value in given.items() if value is not None}
        if input_ids is not None and pixel_values is not None:
            images |= self._token_types(input_ids, images)
        if unknown := sorted(images.keys() - {"pixel_values", *self.vision.inputs}):
            raise ValueError(f"{self.family.name} does not take {', '.join(unknown)}. Leave it out of the batch.")
        if labels is None or input_ids is None:
            if document_lengths is not None:
                raise ValueError("document_lengths are for training: pass labels and input_ids with them.")
            with torch.compiler.set_stance("force_eager") if self.is_compiled else contextlib.nullcontext():
                return super(QLoRADecoder, self).forward(  # type: ignore[misc,no-any-return]
                    input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                    past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
                    logits_to_keep=logits_to_keep, **images, **kwargs,
                )  # fmt: skip
        if kwargs:
            raise ValueError(f"With labels, the model does not take {', '.join(sorted(kwargs))}. Leave it out.")
        has_images = "pixel_values" in images
        if has_images and document_lengths is not None and (self.vision.mrope or self.vision.images_see_themselves):
            raise ValueError(
                f"{self.family.name} cannot take packed rows with images here, because its positions or its attention "
                "depend on where images are. Train with one sample per row."
            )
        if has_images and position_ids is None:
            position_ids = self.positions(input_ids, images, attention_mask)
        embeds, more = self._embed(input_ids, images, num_image_tokens)
        if has_images and self.vision.images_see_themselves:
            prepared: dict[str, Any] = {"attention_mask": self._image_masks(images["token_type_ids"], attention_mask)}
        else:
            prepared, _ = self.attention_kwargs(
                input_ids, attention_mask=attention_mask, document_lengths=document_lengths, plain_rows=(
                    attention_mask is None and (position_ids is None or position_ids.ndim == 3)
                ),
            )  # fmt: skip
        outputs = self.decoder(
            inputs_embeds=embeds, position_ids=position_ids, use_cache=False, **prepared, **more,
        )  # fmt: skip
        loss = self.loss_of(outputs.last_hidden_state, labels, num_items_in_batch, num_loss_tokens, loss_inputs)
        return CausalLMOutputWithPast(loss=loss)

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """As transformers', which is told what tokens are an image's where the caller does not say."""
        ids = kwargs.get("input_ids", inputs)
        if ids is not None and kwargs.get("pixel_values") is not None:
            kwargs |= self._token_types(ids, kwargs)
        return super().generate(inputs, **kwargs)  # type: ignore[misc]

    def _token_types(self, input_ids: Tensor, images: dict[str, Any]) -> dict[str, Tensor]:
        """Which tokens are an image's, under the family's name: transformers silently computes as if none were, if it
        is not told."""
        name = next((n for n in ("token_type_ids", "mm_token_type_ids") if n in self.vision.inputs), None)
        given = images.get("token_type_ids", images.get("mm_token_type_ids"))
        if name is None:
            return {}
        return {name: (input_ids == self.config.image_token_id).int() if given is None else given}

    def positions(
        self, input_ids: Tensor, images: dict[str, Any], attention_mask: Tensor | None = None
    ) -> Tensor | None:
        """Positions in time, height and width [3, B, S] of a batch with images, where the family has them.

        Args:
            input_ids: int64 [B, S]. On the host nothing waits for the device.
            images: The batch's images.
            attention_mask: [B, S], 0 for padding.
        """
        if not self.vision.mrope:
            return None
        types = self._token_types(input_ids, images)["mm_token_type_ids"]
        found: Tensor = self.model.get_rope_index(
            input_ids, mm_token_type_ids=types, image_grid_thw=images["image_grid_thw"], attention_mask=attention_mask
        )[0]
        return found

    def _embed(
        self, input_ids: Tensor, images: dict[str, Any], num_image_tokens: int | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The language model's inputs [B, S, H], and what else of the images it takes."""
        is_image = input_ids == self.config.image_token_id
        text = input_ids
        if self.config.image_token_id >= self.decoder.embed_tokens.num_embeddings:
            text = input_ids.masked_fill(is_image, 0)
        embeds: Tensor = self.decoder.embed_tokens(text)
        if "pixel_values" not in images:
            return (embeds + self._nothing(embeds) if self._runs_without_images else embeds), {}
        features, deep = self._features({n: v for n, v in images.items() if not n.endswith("token_type_ids")})
        found = int(is_image.sum()) if num_image_tokens is None else num_image_tokens
        if found != len(features):
            raise ValueError(
                f"The batch's images make {len(features)} tokens, but input_ids have {found} placeholders (token "
                f"{self.config.image_token_id}). Each image needs as many placeholders as tokens: was an image's span "
                "cut, or an image left out?"
            )
        embeds = embeds.masked_scatter(is_image.unsqueeze(-1), features.to(embeds.dtype))
        return embeds, {"visual_pos_masks": is_image, "deepstack_visual_embeds": deep} if deep else {}

    def _features(self, images: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """The tokens of all images [tokens, H], and those that Qwen3-VL adds behind its first layers."""
        images = {**images, "pixel_values": images["pixel_values"].to(self._tower_dtype)}
        output = self.model.get_image_features(**images)
        tokens = output.pooler_output
        features = tokens.flatten(0, -2) if isinstance(tokens, Tensor) else torch.cat([*tokens]).flatten(0, -2)
        deep = getattr(output, "deepstack_features", None) or []
        return features, [each if isinstance(each, Tensor) else torch.cat([*each]) for each in deep]

    @property
    def _tower_dtype(self) -> torch.dtype:
        """Of the layer that takes the pixels."""
        tower = self.model.get_submodule(self.vision.tower)
        return next(m.weight.dtype for m in tower.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))

    @property
    def _runs_without_images(self) -> bool:
        """Whether the vision side must run for a batch without images.

        FSDP2 gathers its weights on all ranks or none, and another rank may have images. And what is trained of it must
        have a gradient on each rank under DDP, and on one device as on many.
        """
        blocks = self.vision.blocks(self.model)
        return isinstance(blocks[0], FSDPModule) or (self.vision_learns and torch.is_grad_enabled())

    def _nothing(self, embeds: Tensor) -> Tensor:
        """A zero whose gradient goes through the vision side, from the smallest image that it takes."""
        features, deep = self._features(self.vision.blank(self.config, embeds.device, self._tower_dtype))
        total = torch.stack([each.float().sum() for each in (features, *deep)]).sum() * 0.0
        return total.to(embeds.dtype)

    def _image_masks(self, token_types: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
        """Masks bool [B, 1, S, S] by type of layer: causal, and images that see all of themselves."""
        is_image, length = token_types == 1, token_types.shape[1]
        begins = is_image & ~nn.functional.pad(is_image, (1, 0))[:, :-1]
        number = torch.where(is_image, begins.cumsum(1), 0)
        place = torch.arange(length, device=token_types.device)
        behind = place[:, None] - place[None, :]
        same = (number[:, :, None] == number[:, None, :]) & is_image[:, :, None]
        full = (behind >= 0) | same
        if attention_mask is not None:
            full = full & attention_mask[:, None, :].bool()
        masks = {"full_attention": full[:, None]}
        if (window := self.config.get_text_config().sliding_window) is not None:
            masks["sliding_attention"] = (full & (behind < window))[:, None]
        return masks

    # --- parameters --------------------------------------------------------------------------------------------------

    @property
    def vision_learns(self) -> bool:
        """Whether anything of the vision side is trained."""
        return self.options.vision_lora or self.options.projector != "frozen"

    def _is_projector(self, name: str) -> bool:
        return any(f"model.{projector}." in name for projector in self.vision.projectors)

    def is_trained(self, name: str) -> bool:
        """Adapters, and the projector where it is trained in full."""
        return super().is_trained(name) or (self.options.projector == "full" and self._is_projector(name))

    def is_new(self, name: str) -> bool:
        """The adapters: a projector that is trained in full starts from the checkpoint's."""
        return is_adapter(name)

    def may_adapt(self, name: str) -> bool:
        """The projections of decoder layers and, if so configured, layers of the tower and of the projector."""
        options = self.options
        pattern = self.vision.targets(
            self.config, self.family.projections, tower=options.vision_lora, projector=options.projector == "lora"
        )
        return matches(pattern, name)

    def left_unadapted(self) -> str | None:
        """What the options say is adapted and no adapter is on, as the beginning of a sentence; ``None``: nothing."""
        adapted = [name for name, _ in self.named_parameters() if is_adapter(name)]
        in_tower = any(f"model.{self.vision.tower}." in n and not self._is_projector(n) for n in adapted)
        if self.options.vision_lora and not in_tower:
            return "The vision tower (--vision_lora) is"
        if self.options.projector == "lora" and not any(self._is_projector(name) for name in adapted):
            return "The projector (--projector=lora) is"
        return None

    def quantizes(self, name: str) -> bool:
        """The language model's layers and, if so configured, those of the tower's blocks."""
        if name.startswith(f"model.{self.vision.language_model}."):
            return True
        in_tower = name.startswith(f"model.{self.vision.tower}.") and not self._is_projector(name)
        return self.options.quantize_vision and in_tower

    def checkpoint_layers(self, recomputed: int, *, offload: bool) -> None:
        """As :meth:`QLoRADecoder.checkpoint_layers`; blocks of a tower that learns are recomputed if any layer is."""
        super().checkpoint_layers(recomputed, offload=offload)
        for block in self.vision.blocks(self.model):
            assert isinstance(block, TowerBlock)
            block.tower_learns = self.options.vision_lora
            block.checkpoint_activations = recomputed > 0

    def compile_regions(self, mode: CompileMode = "default", *, backend: Any = "inductor") -> None:
        """As :meth:`QLoRADecoder.compile_regions`, and the tower's blocks."""
        super().compile_regions(mode, backend=backend)
        if mode == "off":
            return
        for block in self.vision.blocks(self.model):
            compile_region(block, mode, backend=backend, kind=("tower", block.checkpoint_activations))

    def first_groups(self) -> list[list[nn.Module]]:
        """Each block of the tower, then the projector."""
        return [
            *([block] for block in self.vision.blocks(self.model)),
            [self.model.get_submodule(name) for name in self.vision.projector_modules(self.config)],
        ]


@dataclass(frozen=True)
class VisionLanguageHead:
    """The head of a vision-language model: a language model's, with a vision side in front.

    Args:
        model_type: Of the family.
        projectors: Names of the projector's modules: see :meth:`VisionSide.projector_modules`.
        options: What is trained of the vision side.

    Raises:
        ValueError: For adapters on a projector without linear layers.
    """

    model_type: str
    projectors: tuple[str, ...]
    options: VisionOptions = VisionOptions()
    task_type: ClassVar[str | None] = "CAUSAL_LM"
    takes_images: ClassVar[bool] = True

    @classmethod
    def of(cls, config: PretrainedConfig, options: VisionOptions = VisionOptions()) -> VisionLanguageHead:
        """For a model of ``config``."""
        side = VISION_FAMILIES[config.model_type].vision
        assert side is not None
        return cls(config.model_type, side.projector_modules(config), options)

    def __post_init__(self) -> None:
        family = VISION_FAMILIES[self.model_type]
        assert family.vision is not None
        if self.options.projector == "lora" and not family.vision.projector_linears:
            raise ValueError(
                f"--projector=lora: the projector of {family.name} has no linear layers that LoRA could adapt. Use "
                "full or frozen."
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """What a batch may hold for images."""
        side = VISION_FAMILIES[self.model_type].vision
        assert side is not None
        return ("pixel_values", *side.inputs)

    @property
    def trained_modules(self) -> tuple[str, ...]:
        """The projector's modules where they are trained in full."""
        return self.projectors if self.options.projector == "full" else ()

    def with_targets(self, lora: LoraConfig, config: PretrainedConfig) -> LoraConfig:
        """``lora`` with one regular expression over whole names, which stock peft understands too.

        Raises:
            ValueError: If it names a layer that is not a projection of the decoder layers.
        """
        if isinstance(lora.target_modules, str) and lora.target_modules != "all-linear":
            return lora  # a regular expression already
        family = VISION_FAMILIES[config.model_type]
        assert family.vision is not None
        names = with_targets(lora, family.projections).target_modules
        assert names is not None
        assert not isinstance(names, str)
        lora = copy.copy(lora)
        lora.target_modules = family.vision.targets(
            config, [name.rpartition(".")[2] for name in names], tower=self.options.vision_lora,
            projector=self.options.projector == "lora",
        )  # fmt: skip
        return lora

    def __call__(self, model: PreTrainedModel, family: Family) -> QLoRAForVisionLanguage:
        """Give transformers' own model the loss and the mixins of its vision side."""
        assert family.vision is not None
        give_loss(model, family)
        specialize_tower(model.model, family, model.config)
        model.__class__ = mixed(QLoRAForVisionLanguage, type(model))
        assert isinstance(model, QLoRAForVisionLanguage)
        model.vision, model.options = family.vision, self.options
        model.compiles_rotary = not family.vision.mrope  # three positions are no size that may vary
        model.tie_head()
        return model
