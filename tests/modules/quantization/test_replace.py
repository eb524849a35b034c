"""Replacing the linear layers of a model."""

import pytest
import torch
from torch import nn

from lightning_qlora.modules.quantization import NF4Linear, quantize_linears


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_quantize_linears_replaces_all_but_the_skipped(device):
    with torch.device(device):
        model = nn.ModuleDict({"proj": nn.Linear(16, 8), "act": nn.ReLU(), "lm_head": nn.Linear(8, 4, bias=False)})
        model["block"] = nn.Sequential(nn.Linear(8, 8, bias=False))
    quantize_linears(model, quant_type="fp4")
    assert isinstance(model["proj"], NF4Linear)
    assert isinstance(model["block"][0], NF4Linear)
    assert type(model["lm_head"]) is nn.Linear
    assert model["proj"].weight.device.type == device
    assert model["proj"].quant_type == "fp4"
    assert (model["proj"].bias is not None, model["block"][0].bias is not None) == (True, False)


def test_quantize_linears_keeps_what_is_shared_and_the_mode():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval()
    model.append(model[0])
    quantize_linears(model)
    assert isinstance(model[0], NF4Linear)
    assert model[2] is model[0]
    assert not model[0].training


def test_quantize_linears_refuses_before_it_replaces():
    model = nn.Sequential(nn.Linear(16, 60), nn.Sequential(nn.Linear(60, 8)))
    with pytest.raises(ValueError, match=r"1\.0 has 60 input features.*skip=\('lm_head', '0'\)"):
        quantize_linears(model)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"use NF4Linear\.from_linear"):
        quantize_linears(nn.Linear(16, 8))
