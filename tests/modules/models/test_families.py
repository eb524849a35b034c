"""Every family of the table, on tiny random models made here: each equals stock transformers and peft.

The models have each kind of layer that their family knows: windows, layers without rotary embedding, soft caps.
"""

import copy
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import BitsAndBytesConfig, PreTrainedModel

from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.dtensor import copy_local_rows
from lightning_qlora.modules.export.merge import merge_adapter
from lightning_qlora.modules.lora.adapter_files import load_adapter, save_adapter
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.models.build import build_model, build_structure, materialize
from lightning_qlora.modules.models.causal_lm import QLoRAForCausalLM
from lightning_qlora.modules.models.decoder_layer import CheckpointedLayer
from lightning_qlora.modules.models.families import FAMILIES, Family, layer_windows, load_config
from lightning_qlora.modules.quantization.nf4_linear import NF4Linear
from lightning_qlora.modules.training.memory_plan import Settings, plan_memory
from tests.distributed import RankPools
from tests.graphs import Graphs

pytestmark = pytest.mark.usefixtures("one_thread")

#: What differs from the common tiny shape; windows are short, so that they matter.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 24},
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo2": {},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
                "logits_scaling": 2.0},
    "phi3": {"sliding_window": 6},
    "gemma2": {"head_dim": 24, "sliding_window": 6, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 24, "sliding_window": 6, "query_pre_attn_scalar": 20,
                    "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip

#: Kinds of decoder layers in these models.
KINDS = {"qwen2": 2, "smollm3": 2, "gemma2": 2, "gemma3_text": 2}

VOCAB_SIZE = 120


def save(directory: Path, family: Family) -> Path:
    """Random weights in bfloat16; norms are not one and biases not zero, so that they matter."""
    torch.manual_seed(0)
    common = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 128, "initializer_range": 0.1,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = family.model_class.config_class(**{**common, **SHAPES[family.model_type]})
    model = family.model_class(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, parameter.mean().item() if "norm" in name else 0.0, 0.2)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def directory(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp(family.model_type), family)


def attention_for(family: Family) -> str:
    return "eager" if family.model_type == "gemma2" else "sdpa"


def load(directory: Path, lora: LoraConfig | None = None, **options: Any) -> QLoRAForCausalLM:
    """A model in training mode whose adapters all matter; compiled if a ``backend`` is given."""
    checkpoint = SafetensorsCheckpoint(directory)
    backend = options.pop("backend", None)
    attention = attention_for(FAMILIES[load_config(directory).model_type])
    model = build_model(checkpoint, lora or default_lora(4), **{"attention": attention, **options})
    if backend is not None:
        model.compile_regions(backend=backend)
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    randomize(model)
    return model.train()


def randomize(model: nn.Module) -> None:
    """Give the adapters values that matter, by name."""
    for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1
            parameter.data.copy_(values)


@pytest.fixture(scope="module")
def model(directory: Path) -> QLoRAForCausalLM:
    return load(directory)


@pytest.fixture(scope="module")
def stock(family: Family, directory: Path, model: QLoRAForCausalLM) -> PreTrainedModel:
    """transformers' own model, in float32, of the same dequantized weights."""
    found = family.model_class.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, NF4Linear):
                found.get_submodule(name.removesuffix(".base_layer")).weight.copy_(layer.dequantize())
    return found.eval()


def with_adapters(stock: PreTrainedModel, model: QLoRAForCausalLM) -> PeftModel:
    """``stock`` under peft, with the adapters of ``model``."""
    peer = get_peft_model(copy.deepcopy(stock), default_lora(4))
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "lora_" in name:
                parameter.copy_(ours[name.removeprefix("base_model.model.")])
    return peer


def token_ids(batch: int = 2, length: int = 20) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(100 * batch + length))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name, without what peft puts in front; and forgets them."""
    found = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@torch.no_grad()
def test_logits_are_those_of_transformers(model, stock):
    ids, peer = token_ids(), with_adapters(stock, model).eval()
    expected = peer(input_ids=ids).logits
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - stock(input_ids=ids).logits).abs().max() > 0.05, "the adapters would not matter"
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # left padding, as in generation
    padded = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(
        padded, peer(input_ids=ids, attention_mask=mask).logits[mask.bool()], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("checkpoint_activations", [False, True], ids=["kept", "recomputed"])
def test_loss_and_gradients_are_those_of_transformers_and_peft(model, stock, checkpoint_activations):
    for layer in model.model.layers:
        layer.checkpoint_activations = checkpoint_activations
    ids, peer = token_ids(), with_adapters(stock, model)
    labels = ids.masked_fill(torch.arange(20) < 4, -100)
    losses = [each.train()(input_ids=ids, labels=labels).loss for each in (model, peer)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    found, expected = gradients(model), gradients(peer)
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 2 * len(model.family.projections)
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_packed_rows_equal_their_documents_alone(model):
    lengths, model = [11, 3, 9], model.train()
    documents = [token_ids(1, length) for length in lengths]
    alone = [model(input_ids=ids, labels=ids, num_items_in_batch=1).loss for ids in documents]
    torch.stack(alone).sum().backward()
    expected = gradients(model)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = torch.cat(documents, 1)
    packed = model(
        input_ids=ids, labels=ids.masked_fill(positions == 0, -100), position_ids=positions, num_items_in_batch=1,
        document_lengths=[lengths],
    ).loss  # fmt: skip
    torch.testing.assert_close(packed, torch.stack(alone).sum(), rtol=1e-5, atol=1e-5)
    packed.backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-5)


def test_each_kind_of_layer_is_one_graph_for_all_lengths(fresh_graphs, family, directory, model):
    graphs = Graphs("eager")
    compiled = load(directory, backend=graphs, checkpoint_activations=True)
    rotary = 2 if family.model_type == "gemma3_text" else 1  # its frequencies differ by type of layer
    for shape in [(2, 9), (3, 12), (2, 20), (4, 64), (5, 33)]:
        ids = token_ids(*shape)
        losses = [each.train()(input_ids=ids, labels=ids).loss for each in (compiled, model)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients(compiled), gradients(model), rtol=1e-4, atol=1e-5)
        assert graphs.count == KINDS.get(family.model_type, 1) + rotary + 1, shape  # and the last norm


@pytest.mark.parametrize(
    "family", [FAMILIES[name] for name in ("llama", "olmo2", "gemma3_text")], indirect=True,
    ids=lambda family: family.model_type,
)  # fmt: skip
def test_a_compiled_layer_keeps_what_is_planned(fresh_graphs, monkeypatch, family, directory, model):
    """One that is not recomputed; beside one that is, its gradients are right."""
    compiled = load(directory, backend="aot_eager_decomp_partition", checkpoint_activations=1)
    weights = {t.untyped_storage().data_ptr() for t in (*compiled.parameters(), *compiled.buffers())}
    kept: list[dict[int, int]] = []
    call = CheckpointedLayer.__call__

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[-1][storage.data_ptr()] = storage.nbytes()
        return tensor

    def watched(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kept.append({})
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return call(layer, *args, **kwargs)

    ids = token_ids(2, 60)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointedLayer, "__call__", watched)
        loss = compiled(input_ids=ids, labels=ids).loss
    loss.backward()
    expected = model.train()(input_ids=ids, labels=ids).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(compiled), gradients(model), rtol=1e-4, atol=1e-5)

    settings = Settings(
        config=compiled.config, lora=default_lora(4), batch_size=2, seq_len=60, strategy="single",
        precision="32-true", compile=True,
    )  # fmt: skip
    plans = [plan_memory(dataclasses.replace(settings, checkpoint_activations=n)).moments["loss"] for n in (1, 2)]
    one_input = 2 * 60 * 64 * 4
    planned = plans[0]["activations"] - plans[1]["activations"] + one_input
    recomputed, whole = (sum(each.values()) for each in kept)
    rotary = 2 * 60 * compiled.config.head_dim * 4 if hasattr(compiled.config, "head_dim") else 2 * 60 * 16 * 4
    assert whole - rotary == pytest.approx(planned, rel=0.03)
    assert recomputed - rotary < 0.5 * whole


def test_the_adapter_opens_in_peft_and_back(model, stock, tmp_path, directory):
    save_adapter(model, tmp_path, default_lora(4), str(directory))
    ids, opened = token_ids(), PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path).eval()
    expected = opened(input_ids=ids).logits
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)

    peer = get_peft_model(copy.deepcopy(stock), default_lora(4))
    randomize(peer)
    peer.save_pretrained(tmp_path / "theirs")
    loaded = load(directory)
    load_adapter(loaded, tmp_path / "theirs", default_lora(4))
    expected = peer.eval()(input_ids=ids).logits
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_merging_equals_merging_by_hand(family, model, stock, tmp_path, directory):
    save_adapter(model, tmp_path / "adapter", default_lora(4), str(directory))
    merged = merge_adapter(
        directory, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32, quantize_base=True,
        check_ids=token_ids(1)[0],
    )  # fmt: skip
    assert merged.adapted == 2 * len(family.projections)
    expected = with_adapters(stock, model).merge_and_unload().state_dict()
    found = family.model_class.from_pretrained(merged.directory, dtype=torch.float32).state_dict()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_4bit_checkpoint_of_transformers_is_loaded_byte_for_byte(family, directory, tmp_path):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = family.model_class.from_pretrained(directory, quantization_config=quantization, device_map="cpu")
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, NF4Linear)]
    assert len(layers) == 2 * len(family.projections)
    for name, layer in layers:
        stored = theirs.get_submodule(name.removesuffix(".base_layer")).weight
        found = layer.quantized()
        assert torch.equal(found.packed, stored.data.view(torch.uint8).flatten())
        assert torch.equal(found.absmax, stored.quant_state.absmax)
        assert torch.equal(found.absmax2, stored.quant_state.state2.absmax)


@pytest.mark.filterwarnings("ignore")
def test_greedy_tokens_are_those_of_transformers(model, stock):
    ids, options = token_ids(1, 9), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    peer = with_adapters(stock, model).eval()
    model.eval()
    assert torch.equal(model.generate(input_ids=ids, **options), peer.generate(input_ids=ids, **options))


def sharded_step(directory: Path) -> tuple[float, dict[str, Tensor]]:
    """Loss and full gradients of the adapters on this rank; every rank takes the same batch."""
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_model(
        checkpoint, default_lora(4), attention=attention_for(FAMILIES[load_config(directory).model_type])
    )
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for group in [*model.shard_groups(), [model]]:
        fully_shard(group, mesh=mesh)
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if "lora_B" in name:
            copy_local_rows(
                parameter, torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1
            )
    ids = token_ids()
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: gradient.full_tensor() for name, gradient in gradients(model).items()}


def test_two_ranks_of_fsdp2_equal_one(ranks: RankPools, directory, model):
    for layer in model.model.layers:
        layer.checkpoint_activations = False
    ids = token_ids()
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    expected = gradients(model)
    for found, grads in ranks.run(2, "cpu", sharded_step, directory):
        assert found == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)


def test_the_memory_plan_knows_the_bytes_of_the_weights(directory, model):
    config = load_config(directory)
    plan = plan_memory(Settings(config=config, lora=default_lora(4), batch_size=1, seq_len=8, precision="32-true"))
    layers = {id(p) for p in model.model.layers.parameters()}
    parameters = [*model.parameters()]

    def size(tensors: Iterable[Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    held = {
        "4-bit layers": size(p for p in parameters if id(p) in layers and not p.requires_grad),
        "embeddings and head": size(p for p in parameters if id(p) not in layers),
        "adapters": size(p for p in parameters if p.requires_grad),
        "statistics": size(b for m in model.modules() if isinstance(m, NF4Linear) for b in m.buffers()),
    }
    assert {part: plan.moments["step"][part] for part in held} == held


# ------------------------------------------------------------------------------------------------------------ refusals


def test_an_architecture_outside_the_table_is_refused_with_the_list(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ValueError, match=r"is a 'mamba' model \(MambaForCausalLM\).*Llama.*Phi-3.*Gemma3"):
        load_config(tmp_path)


def test_a_window_of_ones_own_is_for_models_without(tmp_path):
    config = load_config(save(tmp_path, FAMILIES["mistral"]))
    assert layer_windows(config) == [6, 6]
    with pytest.raises(ValueError, match="sliding_window=4 is for models without windows of their own"):
        layer_windows(config, 4)
    config.sliding_window = None
    assert layer_windows(config, 4) == [4, 4]


def test_experts_that_would_stay_unquantized_are_refused(monkeypatch):
    moe = Family("Qwen3 with experts", "qwen3_moe", "Qwen3MoeForCausalLM", "qwen3moe")
    monkeypatch.setitem(FAMILIES, "qwen3_moe", moe)
    config = moe.model_class.config_class(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, moe_intermediate_size=32,
        num_experts=4, num_experts_per_tok=2, vocab_size=90, decoder_sparse_step=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts.*mixtures of experts are not supported"):
        build_structure(config, default_lora(4))
