"""Merged weights are stock peft's, from every form of a base; what cannot be merged is refused and leaves nothing."""

import ctypes
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.export import merge
from lightning_qlora.modules.export.merge import merge_adapter
from lightning_qlora.modules.export.weights import FinetunedWeights, LoraUpdate, adapter_config
from lightning_qlora.modules.lora.adapter_files import save_adapter
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.models.build import build_model, materialize

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, 300, (17,), generator=torch.Generator().manual_seed(0))
LORAS = {
    "all layers": default_lora(4),
    "rank-stabilized, some layers": LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["v_proj", "up_proj"], layers_to_transform=[1]
    ),
    "patterns, and the head": LoraConfig(
        r=4,
        lora_alpha=5,
        target_modules=["q_proj", "k_proj", "lm_head"],
        rank_pattern={"k_proj": 2},
        alpha_pattern={r"layers.1.self_attn.q_proj": 9},
        init_lora_weights="gaussian",
    ),
}


def save_stock_adapter(model: LlamaForCausalLM, lora: LoraConfig, directory: Path) -> Path:
    stock = get_peft_model(model, lora)
    torch.manual_seed(1)
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    stock.save_pretrained(directory, save_embedding_layers=False)
    return directory


@pytest.fixture
def adapter(tiny_llama_dir: Path, dense_llama: Callable[[Path], LlamaForCausalLM], tmp_path: Path) -> Path:
    """One of rank 4 on all projections."""
    return save_stock_adapter(dense_llama(tiny_llama_dir), default_lora(4), tmp_path / "adapter")


def weights(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def stock_merged(base: LlamaForCausalLM, adapter: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    state = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    return {name: tensor.to(dtype) for name, tensor in state.items()}


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_merged_weights_are_those_of_stock_peft_in_float32(lora, dtype, tiny_llama_dir, tmp_path):
    def base() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)

    directory = save_stock_adapter(base(), lora, tmp_path / "adapter")
    merged = merge_adapter(tiny_llama_dir, directory, tmp_path / "out", dtype=dtype, check_ids=IDS)
    expected = stock_merged(base(), directory, dtype)
    found = weights(tmp_path / "out")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    changed = [n for n, p in base().state_dict().items() if not torch.equal(found[n], p.to(dtype))]
    assert (merged.adapted, merged.dtype, merged.base_is_4bit) == (len(changed), dtype, False)


@pytest.mark.parametrize("form", ["nested", "plain", "bf16-storage", "fp4", "partial", "tied", "aligned"])
def test_a_4_bit_base_is_dequantized(form, tiny_llama_4bit_dirs, dense_llama, tmp_path):
    directory = tiny_llama_4bit_dirs[form]
    adapter = save_stock_adapter(dense_llama(directory), default_lora(4), tmp_path / "adapter")
    merged = merge_adapter(directory, adapter, tmp_path / "out", dtype=torch.float32, check_ids=IDS)
    expected = stock_merged(dense_llama(directory), adapter, torch.float32)
    if form == "tied":
        del expected["lm_head.weight"]
    torch.testing.assert_close(weights(tmp_path / "out"), expected, rtol=0, atol=0)
    assert merged.base_is_4bit
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("form", ["nested", "16-bit"])
@torch.no_grad()
def test_the_merged_model_computes_what_was_trained(form, tiny_llama_dir, tiny_llama_4bit_dirs, tmp_path):
    directory = tiny_llama_dir if form == "16-bit" else tiny_llama_4bit_dirs[form]
    checkpoint = SafetensorsCheckpoint(directory)
    trained = build_model(checkpoint, default_lora(4))
    materialize(trained, checkpoint, torch.device("cpu"), seed=0)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    save_adapter(trained, tmp_path / "adapter", default_lora(4), str(directory))
    # Training on a 16-bit base quantizes it.
    merge_adapter(
        directory, tmp_path / "adapter", tmp_path / "out", dtype=torch.float32, quantize_base=form == "16-bit"
    )
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(IDS[None]).logits, trained.eval()(input_ids=IDS[None]).logits, rtol=0, atol=1e-4)


def test_the_directory_is_complete_and_sharded(tiny_llama_dir, adapter, tmp_path):
    merged = merge_adapter(tiny_llama_dir, adapter, tmp_path / "a" / "out", max_shard_size="100KB", check_ids=IDS)
    model = LlamaForCausalLM.from_pretrained(merged.directory)
    assert model.dtype == merged.dtype == torch.bfloat16  # the base's own
    files = sorted(merged.directory.glob("*.safetensors"))
    assert len(files) == merged.files > 1
    assert all(file.stat().st_size < 105_000 for file in files)
    assert merged.total_bytes == 2 * model.num_parameters()
    tokenizer = AutoTokenizer.from_pretrained(merged.directory)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_llama_dir).chat_template
    assert (merged.directory / "generation_config.json").read_bytes() == (
        tiny_llama_dir / "generation_config.json"
    ).read_bytes()
    assert [p.name for p in merged.directory.parent.iterdir()] == ["out"]  # nothing temporary is left


def test_parity_is_of_the_size_of_rounding(tiny_llama_dir, adapter, tmp_path):
    parities = [
        merge_adapter(tiny_llama_dir, adapter, tmp_path / str(dtype), dtype=dtype, check_ids=IDS).parity
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
    assert 0 < 10 * parities[0].difference < parities[1].difference < parities[2].difference
    # Eight times the machine precision, eight times the tolerance and, within a factor, the difference.
    assert parities[2].tolerance == pytest.approx(8 * parities[1].tolerance, rel=0.02)
    assert all(p.tolerance / 30 < p.difference < p.tolerance for p in parities[1:])
    assert parities[2].tolerance < parities[2].adapter_effect  # else a forgotten adapter would pass


@pytest.mark.parametrize(
    "wrong",
    [lambda u, w: w.float(), lambda u, w: w + 1.5 * u.scaling * u.b @ u.a],
    ids=["forgotten", "scaled"],
)
def test_both_checks_find_a_wrong_merge_and_keep_nothing(wrong, tiny_llama_dir, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(LoraUpdate, "merged", wrong)
    with pytest.raises(ValueError, match=r"The merged '.*' differs"):
        merge_adapter(tiny_llama_dir, adapter, tmp_path / "out" / "merged", check_ids=IDS)
    monkeypatch.setattr(merge, "_check_layer", lambda *_: None)  # as if the fault were in a layer between
    with pytest.raises(ValueError, match="The merged model's logits differ"):
        merge_adapter(tiny_llama_dir, adapter, tmp_path / "out" / "merged", check_ids=IDS)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("form", ["16-bit", "nested"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight"])
def test_a_base_that_is_misread_is_found_by_another_reader(
    form, name, tiny_llama_dir, tiny_llama_4bit_dir, adapter, tmp_path, monkeypatch
):
    """Both sides of the logits' check would read it alike."""
    read = FinetunedWeights.base

    def misread(self: Any, wanted: str) -> Tensor:
        return read(self, wanted) * (1.01 if wanted == name else 1)

    monkeypatch.setattr(FinetunedWeights, "base", misread)
    directory = tiny_llama_dir if form == "16-bit" else tiny_llama_4bit_dir
    with pytest.raises(ValueError, match=f"merged '{name}' differs by up to .* from what transformers reads"):
        merge_adapter(directory, adapter, tmp_path / "out" / "merged", dtype=torch.float32, check_ids=IDS)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_quantized_base_is_compared_with_what_bitsandbytes_makes_of_it(tiny_llama_dir, adapter, tmp_path):
    merged = merge_adapter(
        tiny_llama_dir, adapter, tmp_path / "out", dtype=torch.float32, quantize_base=True, check_ids=IDS
    )
    assert merged.base_is_4bit


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # peft's, of the other type of adapter
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "holds no LoRA adapter of peft: adapter_config.json is missing"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "is damaged: adapter_config.json"),
        (lambda d: change_config(d, peft_type="IA3"), "is a .*IA3 adapter"),
        (lambda d: change_config(d, use_dora=True), "use_dora=True, which is more than a product"),
        (lambda d: change_config(d, bias="all"), "bias='all', which is more"),
        (lambda d: change_config(d, lora_bias=True), "lora_bias=True, which is more"),
        (lambda d: change_config(d, alora_invocation_tokens=[5]), r"alora_invocation_tokens=\[5\], which is more"),
        (lambda d: change_config(d, fan_in_fan_out=True), "fan_in_fan_out=True, which is more"),
        (lambda d: change_config(d, modules_to_save=["embed_tokens"]), r"modules_to_save=\['embed_tokens'\]"),
        (lambda d: change_config(d, init_lora_weights="pissa"), "init_lora_weights='pissa', which changed the base"),
        (lambda d: change_config(d, target_modules=["c_attn"]), "does not fit the base"),
        (lambda d: change_config(d, target_modules=["q_proj"]), "holds .*down_proj.* is no LoRA weight of the base"),
        (lambda d: change_config(d, target_modules=["q_proj", "embed_tokens"]), "adapts 'model.embed_tokens'"),
        (lambda d: change_config(d, r=8), r"A \(4, 64\) and B \(64, 4\) .* do not fit a weight \(64, 64\) at rank 8"),
        (lambda d: rewrite(d, lambda t: t.pop(Q)), f"lacks '{Q}'"),
        (lambda d: rewrite(d, lambda t: t[Q].fill_(float("nan"))), f"'{Q}' is not finite"),
        (lambda d: rewrite(d, lambda t: t.update({Q: torch.zeros(4, 7)})), "made for another model"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_before_anything_is_written(
    damage, message, tiny_llama_dir, adapter, tmp_path
):
    damage(adapter)
    with pytest.raises(ValueError, match=message):
        merge_adapter(tiny_llama_dir, adapter, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_other_refusals(tiny_llama_dir, tiny_llama_dirs, tiny_llama_4bit_dir, dense_llama, adapter, tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(ValueError, match="exists already"):
        merge_adapter(tiny_llama_dir, adapter, adapter)
    with pytest.raises(ValueError, match="quantized already"):
        merge_adapter(tiny_llama_4bit_dir, adapter, out, quantize_base=True)
    with pytest.raises(ValueError, match="do not fit a weight"):
        merge_adapter(tiny_llama_dirs["aligned"], adapter, out)
    head = save_stock_adapter(dense_llama(tiny_llama_dir), LORAS["patterns, and the head"], tmp_path / "head")
    with pytest.raises(ValueError, match=r"adapts 'lm_head'.*no head that shares"):
        merge_adapter(tiny_llama_dirs["tied"], head, out)
    shrunk = shutil.copytree(tiny_llama_dir, tmp_path / "shrunk")
    state = weights(shrunk)
    state["model.norm.weight"] = torch.ones(3)
    save_file(state, shrunk / "model.safetensors")
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \(3,\), but config.json implies \(64,\)"):
        merge_adapter(shrunk, adapter, out)
    rewrite(adapter, lambda t: t.update({name: 1e3 * tensor for name, tensor in t.items()}))
    with pytest.raises(ValueError, match=r"not finite in torch.float16.*bfloat16"):
        merge_adapter(tiny_llama_dir, adapter, out, dtype=torch.float16)
    assert not out.exists()


def test_a_full_disk_is_noticed_first(tiny_llama_dir, adapter, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=64 * 2**20))
    with pytest.raises(ValueError, match=r"need 0.00 GiB, but .* has 0.06 GiB free"):
        merge_adapter(tiny_llama_dir, adapter, tmp_path / "out")


def test_a_write_that_fails_leaves_nothing(tiny_llama_dir, adapter, tmp_path, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        merge_adapter(tiny_llama_dir, adapter, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads memory from /proc")
def test_memory_is_a_shard_and_a_weight_not_the_model(tmp_path):
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12, vocab_size=300
    )
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).state_dict().items()}
    lora = default_lora(4)
    save_file({n: torch.full(s, 0.01, dtype=torch.bfloat16) for n, s in shapes.items()}, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    lora.save_pretrained(tmp_path)
    adapter = {}
    for name, (n, k) in ((name, shape) for name, shape in shapes.items() if "_proj" in name):
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        adapter |= {f"{prefix}.lora_A.weight": torch.ones(4, k), f"{prefix}.lora_B.weight": torch.ones(n, 4)}
    save_file(adapter, tmp_path / "adapter_model.safetensors")

    def anonymous() -> int:  # not the pages of mapped files, which the system may drop
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    # Weights of real models are so large that malloc maps and unmaps each; it shall do so with these too.
    ctypes.CDLL(None).mallopt(-3, 2**18)  # M_MMAP_THRESHOLD
    samples = [anonymous()]
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            samples.append(anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        merged = merge_adapter(tmp_path, tmp_path, tmp_path / "out", max_shard_size="10MB", check_ids=IDS)
    finally:
        done.set()
        thread.join()
    assert merged.total_bytes > 110e6
    # A shard of 10 MB, a weight of 1.6 million values in float32 with its update, and what allocators keep.
    assert max(samples) - samples[0] < 35e6


def test_the_configuration_names_the_base(adapter):
    change_config(adapter, base_model_name_or_path="some/base")
    assert adapter_config(adapter).base_model_name_or_path == "some/base"
