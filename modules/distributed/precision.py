"""Lightning's precision plugins, chosen by the strategy instead of the Trainer."""

from __future__ import annotations

import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.plugins.precision import Precision as PrecisionPlugin

from ..hardware import check_precision


def precision_plugin(precision: str, device: str | None = None) -> PrecisionPlugin:
    """Lightning's plugin for ``precision``, for strategies that ``Trainer(precision=...)`` refuses or that know more.

    Args:
        precision: ``"32-true"``, ``"16-mixed"``, ``"bf16-mixed"``, ``"bf16-true"`` or ``"auto"``.
        device: Device type of autocast; default ``"cuda"`` where there is a GPU.

    Raises:
        ValueError: For a precision that does not exist or that the hardware lacks.
    """
    checked = check_precision(precision)
    if checked == "16-mixed" or checked == "bf16-mixed":
        return MixedPrecision(checked, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return HalfPrecision(checked) if checked == "bf16-true" else PrecisionPlugin()


def on_device(plugin: PrecisionPlugin, device: torch.device) -> PrecisionPlugin:
    """``plugin`` for the device that the Trainer chose, which is known only after the strategy has been built."""
    if isinstance(plugin, MixedPrecision) and plugin.device != device.type:
        return precision_plugin(plugin.precision, device.type)
    return plugin
