"""What is wrong with a file is found by running it: each test spoils a good file in one place."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from lightning_qlora.modules.checkpoints.tokenizer import load_tokenizer
from lightning_qlora.modules.export import llama_cpp_process
from lightning_qlora.modules.export.gguf import export_gguf
from lightning_qlora.modules.export.llama_cpp import verify_gguf
from lightning_qlora.modules.export.llama_cpp_process import LlamaCpp
from lightning_qlora.modules.export.weights import FinetunedWeights
from tests.modules.export.gguf_models import save_model

pytest.importorskip("xllamacpp", reason="needs the extra llama.cpp")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def good(tiny_llama_dir, tmp_path_factory) -> Path:
    """A Llama with scaled rotary embeddings, whose answers end at a token that llama.cpp knows by its key alone."""
    directory = save_model(tmp_path_factory.mktemp("good"), "llama", initializer_range=0.2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        text = (tiny_llama_dir / name).read_text().replace("<|im_end|>", "<|answered|>")
        (directory / name).write_text(text.replace('"eos_token": "<|answered|>"', '"eos_token": "<|endoftext|>"'))
    export_gguf(FinetunedWeights(directory), directory / "f16.gguf", verify=True)
    export_gguf(FinetunedWeights(directory), directory / "q4_0.gguf", file_type="q4_0", verify=True)
    return directory


def tensor(reader: GGUFReader, name: str) -> np.ndarray:
    return next(each.data for each in reader.tensors if each.name == name)


def swap(reader: GGUFReader) -> None:
    up, gate = tensor(reader, "blk.1.ffn_up.weight"), tensor(reader, "blk.1.ffn_gate.weight")
    up[:], gate[:] = gate.copy(), up.copy()


def unpermute(reader: GGUFReader) -> None:
    query = tensor(reader, "blk.0.attn_q.weight")
    query[:] = query.reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(query.shape).copy()


def scale_rope(reader: GGUFReader) -> None:
    tensor(reader, "rope_freqs.weight")[:] = 1


def change_base(reader: GGUFReader) -> None:
    reader.fields["llama.rope.freq_base"].parts[-1][0] = 500000


def lose_stop_token(reader: GGUFReader) -> None:
    reader.fields["tokenizer.ggml.eot_token_id"].parts[-1][0] = 7


def mix_tokens(reader: GGUFReader) -> None:
    parts = reader.fields["tokenizer.ggml.pre"].parts
    parts[-1][:] = np.frombuffer(b"gpt-4", dtype=np.uint8)[: len(parts[-1])]


NUMBERS = r"In llama\.cpp .* A tensor, the rotary embedding or another number of the file is wrong\."
FAULTS = {
    "a swapped tensor": (swap, NUMBERS),
    "an unpermuted q": (unpermute, NUMBERS),
    "unscaled rope": (scale_rope, NUMBERS),
    "a wrong rope base": (change_base, NUMBERS),
    "a missing stop token": (lose_stop_token, r"llama\.cpp goes on after '<\|answered\|>' \(token 2\), which ends an"),
    "a wrong pre-tokenizer": (mix_tokens, r"cannot load .*unknown pre-tokenizer type: 'gpt-4'"),
}


@pytest.mark.parametrize(("spoil", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(spoil, message, good, tmp_path):
    shutil.copy(good / "f16.gguf", tmp_path / "m.gguf")
    spoil(GGUFReader(tmp_path / "m.gguf", "r+"))
    with pytest.raises(ValueError, match=message):
        verify_gguf(tmp_path / "m.gguf", FinetunedWeights(good), load_tokenizer(good), "f16", (2, 0))


def test_in_a_quantized_file_too(good, tmp_path):
    shutil.copy(good / "q4_0.gguf", tmp_path / "m.gguf")
    swap(GGUFReader(tmp_path / "m.gguf", "r+"))
    with pytest.raises(
        ValueError, match="nats from the model's whose weights are rounded as in the file; arithmetic expl"
    ):
        verify_gguf(tmp_path / "m.gguf", FinetunedWeights(good), load_tokenizer(good), "q4_0")


def test_a_truncated_file_is_refused_with_llama_cpps_reason(good, tmp_path):
    (tmp_path / "m.gguf").write_bytes((good / "f16.gguf").read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"llama\.cpp cannot load .*m\.gguf: .*"):
        LlamaCpp(tmp_path / "m.gguf")


def test_without_the_extra_it_is_said(good, monkeypatch):
    monkeypatch.setattr(llama_cpp_process, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'lightning-qlora\[llama\.cpp\]'; or pass --verify=false"):
        LlamaCpp(good / "f16.gguf")
