"""GGUF's types: what each tensor gets, how near the values stay, and that llama.cpp reads them."""

import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType
from gguf.quants import dequantize

from lightning_qlora.modules.export import _gguf_types
from lightning_qlora.modules.export._gguf_types import FILE_TYPES, Place, convert, find_file_type, tensor_type
from lightning_qlora.modules.export.gguf import check_file_types, export_gguf
from lightning_qlora.modules.export.weights import FinetunedWeights
from tests.modules.export.gguf_models import export, value

pytestmark = pytest.mark.usefixtures("one_thread")

#: Bits of a weight and the largest error relative to the largest weight of its block, from how the type rounds.
ERRORS = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127, "Q5_1": 2 / 31, "Q5_0": 1 / 15, "Q4_1": 2 / 15,
          "Q4_0": 1 / 7, "Q6_K": 1 / 31, "Q5_K": 2 / 31, "Q4_K": 2 / 15, "Q3_K": 1 / 3, "Q2_K": 1}  # fmt: skip


def needs_libgguf() -> None:
    pytest.importorskip("libgguf", reason="needs the extra libgguf")


@pytest.mark.parametrize("name", ERRORS)
def test_values_stay_as_near_as_the_type_can_be(name):
    if name.endswith("_K"):
        needs_libgguf()
    kind = GGMLQuantizationType[name]
    weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    found = torch.from_numpy(dequantize(convert(weight, kind, "w"), kind)).view(3, 512)
    error = (found - weight).abs().max() / weight.abs().max()
    assert ERRORS[name] / 20 <= error <= ERRORS[name]  # it is that type, and no better one


def test_chunks_are_the_whole(monkeypatch):
    weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    whole = convert(weight, GGMLQuantizationType.Q5_1, "w")
    monkeypatch.setattr(_gguf_types, "_CHUNK", 130)
    np.testing.assert_array_equal(convert(weight, GGMLQuantizationType.Q5_1, "w"), whole)


def test_the_mixes_are_those_of_llama_quantize():
    def kinds(file_type: str, name: str, layers: int = 32, head: bool = False) -> list[str]:
        places = [Place(name, layer, layers, 4, head) for layer in range(layers)]
        return [tensor_type(FILE_TYPES[file_type], (256, 512), place).name for place in places]

    # The first and the last eighth and each third layer between.
    better = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    for name in ("attn_v", "ffn_down"):
        assert [layer for layer, kind in enumerate(kinds("q4_k_m", name)) if kind == "Q6_K"] == better
        assert [layer for layer, kind in enumerate(kinds("q5_k_m", name)) if kind == "Q6_K"] == better
    assert {*kinds("q4_k_m", "attn_q")} == {"Q4_K"}
    assert kinds("q4_k_s", "attn_v", 8)[:5] == ["Q5_K"] * 4 + ["Q4_K"]
    assert kinds("q3_k_m", "attn_v")[:3] == ["Q5_K", "Q5_K", "Q4_K"]
    assert {*kinds("q2_k", "attn_v")} == {"Q4_K"}
    assert {*kinds("q4_k_m", "output", head=True)} == {"Q6_K"}
    assert {*kinds("q4_0", "token_embd", head=True)} == {"Q8_0"}


def test_rows_that_are_no_whole_blocks():
    place = Place("ffn_up", 0, 2, 1, is_head=False)
    assert tensor_type(FILE_TYPES["q4_k_m"], (8, 96), place).name == "Q5_0"
    assert tensor_type(FILE_TYPES["q6_k"], (8, 96), place).name == "Q8_0"
    assert tensor_type(FILE_TYPES["q8_0"], (8, 90), place).name == "F16"
    assert tensor_type(FILE_TYPES["q4_0"], (96,), place).name == "F32"


@pytest.mark.parametrize("name", ["bf16", "f32", "q8_0", "q4_0", "q5_1", "q2_k", "q3_k_m", "q4_k_m", "q6_k"])
def test_llama_cpp_reads_it(name, model):
    pytest.importorskip("xllamacpp", reason="needs the extra llama.cpp")
    if FILE_TYPES[name].needs_libgguf:
        needs_libgguf()
    exported, verified = export(model("qwen3", hidden_size=256, intermediate_size=256, head_dim=64), name)
    assert value(exported.path, "general.file_type") == FILE_TYPES[name].id
    assert exported.notes == ()
    kinds = {each.tensor_type.name for each in GGUFReader(exported.path).tensors}
    assert kinds >= {"F32", name.upper().removesuffix("_M")}
    # Three times what these weights showed; from weights rounded in the same way, what llama.cpp's arithmetic adds.
    kl = {"f32": 1e-7, "bf16": 1.5e-4, "q8_0": 0.0017, "q6_k": 0.009, "q5_1": 0.036, "q4_k_m": 0.12, "q4_0": 0.17,
          "q3_k_m": 0.37, "q2_k": 1.03}  # fmt: skip
    assert verified.kl < 3 * kl[name]
    assert verified.kl > kl[name] / 3 or name == "f32"
    assert verified.kl_rounded < 0.003


def test_what_does_not_fit_is_said(model):
    needs_libgguf()
    directory = model("llama", intermediate_size=90)
    exported = export_gguf(FinetunedWeights(directory), directory / "m.gguf", file_type="q4_k_m")
    assert any(
        note.startswith("2 matrices stay F16, because their rows are not multiples of 32") for note in exported.notes
    )
    assert any("rows of 64, 90 get types with blocks of 32" in note for note in exported.notes)


def test_unknown_types_and_absent_packages(monkeypatch):
    with pytest.raises(ValueError, match=r"'q4_9' is no GGUF type.*f16, bf16, q8_0"):
        find_file_type("q4_9")
    with pytest.raises(ValueError, match="named twice: q8_0, q8_0"):
        check_file_types(["q8_0", "Q8_0"])
    monkeypatch.setitem(__import__("sys").modules, "libgguf", None)
    assert check_file_types(["q8_0", "f16"]) == ["q8_0", "f16"]
    with pytest.raises(
        ValueError, match=r"q4_k_m is a K-quant.*pip install 'lightning-qlora\[libgguf\]'; or take q8_0"
    ):
        check_file_types(["f16", "q4_k_m"])


def test_file_types_are_llama_cpps():
    for name, file_type in FILE_TYPES.items():
        assert LlamaFileType[("ALL_" if name == "f32" else "MOSTLY_") + name.upper()] == file_type.id
    assert json.dumps(sorted(FILE_TYPES)).count("_k") == 9
