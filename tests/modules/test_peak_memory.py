"""Peak memory of a call against tensors of known size."""

from __future__ import annotations

import pytest
import torch

from lightning_qlora.modules.hardware import peak_mib

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_peak_is_of_this_call_alone(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")

    def allocate(mib: int) -> None:
        torch.ones(mib * 2**18, device=device)  # float32, freed again

    kept = torch.ones(2**24, device=device)  # in use before: not counted
    found = [peak_mib(lambda mib=mib: allocate(mib), device) for mib in (200, 50, 100)]
    assert found == pytest.approx([200, 50, 100], abs=8)  # of a process, what else it allocates
    assert kept.numel() == 2**24
