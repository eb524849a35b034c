"""The 4-bit Llama against the stock model of the same checkpoint: logits, loss, generation; and what it refuses.

Shapes: B samples, S tokens a sample.
"""

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import ArrowConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.lora.config import check_lora, default_lora
from lightning_qlora.modules.lora.initialization import init_lora
from lightning_qlora.modules.lora.linear import LoraLinear
from lightning_qlora.modules.losses import linear_cross_entropy
from lightning_qlora.modules.models.build import build_model, materialize
from lightning_qlora.modules.models.causal_lm import QLoRAForCausalLM
from lightning_qlora.modules.models.families import load_config
from lightning_qlora.modules.quantization.nf4_linear import NF4Linear
from lightning_qlora.modules.training.resume_identity import BaseIdentity

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = ["untied", "tied", "biased", "nested", "plain", "bf16-storage", "fp4", "partial"]


def load(directory: Path, lora: LoraConfig | None = None, seed: int = 0, **options: Any) -> QLoRAForCausalLM:
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_model(checkpoint, lora or default_lora(4), **options)
    materialize(model, checkpoint, torch.device("cpu"), seed=seed)
    return model.eval()


@pytest.fixture
def directory(request, tiny_llama_dirs, tiny_llama_4bit_dirs) -> Path:
    """The checkpoint of the variant that the test is parametrized with."""
    return {**tiny_llama_4bit_dirs, **tiny_llama_dirs}[request.param]


@pytest.fixture
def copied(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return shutil.copytree(tiny_llama_dir, tmp_path / "copy")


def token_ids(batch: int = 2, length: int = 17, seed: int = 0) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomize_lora(model: nn.Module) -> None:
    """Make B, which starts at zero, matter."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


# --- the same model


@pytest.mark.parametrize("directory", VARIANTS, indirect=True)
@torch.no_grad()
def test_logits_are_those_of_the_stock_model_with_dequantized_weights(directory, dense_llama):
    ids = token_ids()
    logits = load(directory)(ids).logits
    torch.testing.assert_close(logits, dense_llama(directory)(ids).logits, rtol=0, atol=1e-5)
    assert logits.std() > 0.1  # the weights are large enough for an error to show


@torch.no_grad()
def test_logits_are_those_of_bitsandbytes_own_layers(tiny_llama_4bit_dirs, stock_4bit_llama):
    directory = tiny_llama_4bit_dirs["aligned"]  # else bitsandbytes' CPU kernel is wrong
    stock = stock_4bit_llama(directory)
    for module in stock.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # another kernel, in bf16
            module.weight.quant_state.dtype = torch.float32  # as which it dequantizes; ours takes the input's dtype
        else:  # a quantized checkpoint loads in its own dtype, whatever one asks for
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    ids = token_ids()
    torch.testing.assert_close(load(directory)(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("directory", ["untied", "tied"], indirect=True)
def test_tied_embeddings_are_one_parameter(directory):
    model = load(directory)
    tied = directory.name == "tied"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.weight.shape == (300, 64)
    names = {name for name, _ in model.named_parameters()}
    assert ("lm_head.weight" in names) != tied
    assert len(model.shard_groups()) == (2 if tied else 4)


@pytest.mark.parametrize("directory", ["untied", "tied"], indirect=True)
def test_loss_and_gradients_are_those_of_the_stock_model(directory, dense_llama):
    model, stock = load(directory), dense_llama(directory)
    randomize_lora(model)
    peer = get_peft_model(stock, default_lora(4))
    lora = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    theirs = {
        n.removeprefix("base_model.model.").replace(".default", ""): p
        for n, p in peer.named_parameters()
        if "lora_" in n
    }
    assert lora.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(lora[name])

    ids = token_ids(3, 20)
    labels = ids.clone()
    labels[0, 5:], labels[1, :10] = -100, -100
    ours, expected = model(ids, labels=labels), peer(ids, labels=labels)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, expected.loss)
    ours.loss.backward()
    expected.loss.backward()
    for name, parameter in theirs.items():
        torch.testing.assert_close(lora[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)

    summed, scaled = model(ids, labels=labels, num_items_in_batch=1), model(ids, labels=labels, num_items_in_batch=50)
    counted = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(summed.loss, expected.loss * counted)
    torch.testing.assert_close(scaled.loss, expected.loss * counted / 50)


@torch.no_grad()
def test_outputs_beside_the_loss_are_those_of_the_stock_model(tiny_llama_dir, dense_llama):
    model, stock, ids = load(tiny_llama_dir, attention="eager"), dense_llama(tiny_llama_dir), token_ids()
    stock.set_attn_implementation("eager")
    options = {"labels": ids, "output_hidden_states": True, "output_attentions": True}
    ours, expected = model(ids, **options), stock(ids, **options)
    assert (len(ours.hidden_states), len(ours.attentions)) == (3, 2)
    torch.testing.assert_close(ours.hidden_states, expected.hidden_states, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.attentions, expected.attentions, rtol=0, atol=1e-5)
    assert model(ids, labels=ids).hidden_states is None

    as_tuple = model(ids, return_dict=False, **options)
    torch.testing.assert_close(as_tuple, (ours.loss, ours.hidden_states, ours.attentions), rtol=0, atol=0)
    logits, *_ = model(ids, return_dict=False)
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
@torch.no_grad()
def test_a_variant_added_to_a_layer_computes_as_pefts(option):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6))
    layers = []
    for registered in ({}, {nn.Linear: LoraLinear}):
        model = copy.deepcopy(base)
        for name, options in (("default", {}), ("second", {option: True})):
            lora = LoraConfig(r=2, target_modules=["0"], **options)
            lora._register_custom_module(registered)
            inject_adapter_in_model(lora, model, adapter_name=name)
        layers.append(model[0])
    stock, ours = layers
    assert type(ours) is LoraLinear is not type(stock)
    for parameter, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        theirs.copy_(parameter.normal_())
    x = torch.randn(3, 8)
    outputs = []
    for active in (["default"], ["second"], ["default", "second"]):
        for layer in layers:
            layer.set_adapter(active)
        torch.testing.assert_close(ours(x), stock(x))
        outputs.append(ours(x))
    assert min((a - b).abs().max() for a, b in itertools.combinations(outputs, 2)) > 0.1


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("safe_merge", [False, True])
@torch.no_grad()
def test_a_4_bit_weight_refuses_a_merge_and_stays_as_it_is(merge, safe_merge):
    base = NF4Linear.from_linear(nn.Linear(64, 32))
    lora = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    lora._register_custom_module({nn.Linear: LoraLinear})
    model = get_peft_model(nn.Sequential(base), lora)
    x, packed = torch.randn(3, 64), base.weight.clone()
    before = model(x)
    with pytest.raises(ValueError, match=r"packed in 4 bits cannot take an adapter in.*recipes/merge_adapter.py"):
        getattr(model, merge)(safe_merge=safe_merge)
    assert torch.equal(base.weight.view(torch.uint8), packed.view(torch.uint8))
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_activation_checkpoints_change_no_gradient(tiny_llama_dir):
    ids = token_ids()
    gradients = []
    for checkpoint_activations in (False, True):
        model = load(tiny_llama_dir, checkpoint_activations=checkpoint_activations).train()
        torch.manual_seed(3)
        randomize_lora(model)
        forwards = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *_, calls=forwards: calls.append(1))
        model(ids, labels=ids).loss.backward()
        assert len(forwards) == 1 + checkpoint_activations
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 2 * 2 * 7
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("directory", ["untied", "nested"], indirect=True)
def test_generates_what_the_stock_model_generates(directory, dense_llama):
    ids = token_ids(1, 5)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    generated = load(directory).generate(ids, **options)
    assert torch.equal(generated, dense_llama(directory).generate(ids, **options))
    assert generated.shape[1] > 5


def test_generation_settings_of_the_checkpoint_are_kept(copied):
    (copied / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "do_sample": True}))
    assert load(copied).generation_config.temperature == 0.25


# --- its structure


def test_dtypes(tiny_llama_dir):
    model = load(tiny_llama_dir, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)
    unquantized = (model.model.embed_tokens, model.model.norm, model.lm_head, model.model.layers[0].input_layernorm)
    assert {module.weight.dtype for module in unquantized} == {torch.bfloat16}
    expected = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(model.half().model.rotary_emb.inv_freq, expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model.bfloat16()(token_ids()).logits).all()


@pytest.mark.parametrize(("directory", "dense"), [("untied", 0), ("partial", 1)], indirect=["directory"])
def test_projections_are_4_bit_unless_the_checkpoint_leaves_them_out(directory, dense):
    model = build_model(SafetensorsCheckpoint(directory), default_lora(4))
    assert all(p.is_meta for p in model.parameters())
    projections = {n: m for n, m in model.named_modules() if n.split(".")[-2:-1] and n.endswith("base_layer")}
    assert len(projections) == 14
    unquantized = [n for n, m in projections.items() if not isinstance(m, NF4Linear)]
    assert unquantized == ["model.layers.1.mlp.down_proj.base_layer"] * dense
    assert {n.split("lora_")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        n.removesuffix("base_layer") for n in projections
    }


def test_lora_starts_as_pefts_does_and_from_the_seed_alone(tiny_llama_dir, dense_llama):
    def lora(model: nn.Module, matrix: str) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in model.named_parameters() if matrix in n}

    model = load(tiny_llama_dir, seed=5)
    first = lora(model, "lora_A")
    torch.manual_seed(99)
    init_lora(model, 5)
    torch.testing.assert_close(lora(model, "lora_A"), first, rtol=0, atol=0)
    assert len({float(a.sum()) for a in first.values()}) == len(first)  # no two drawn alike
    init_lora(model, 6)
    assert not any(torch.equal(a, first[n]) for n, a in lora(model, "lora_A").items())

    theirs = lora(get_peft_model(dense_llama(tiny_llama_dir), default_lora(4)), "lora_A")
    for name, a in theirs.items():
        ours = first[name.removeprefix("base_model.model.")]
        bound = a.shape[1] ** -0.5
        assert max(ours.abs().max(), a.abs().max()) <= bound
        assert ours.std() == pytest.approx(a.std(), rel=0.25)  # of 256 and more values
    assert not any(b.any() for b in lora(model, "lora_B").values())


def test_the_head_is_the_chunked_loss(tiny_llama_dir):
    model, ids = load(tiny_llama_dir), token_ids()
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        expected = linear_cross_entropy(hidden[:, :-1], model.lm_head.weight, ids[:, 1:], chunk_tokens=3)
        torch.testing.assert_close(model(ids, labels=ids).loss, expected)


# --- refusals


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json: it is not a transformers model directory"),
        (lambda d: (d / "config.json").write_text('{"model_type": '), "config.json is not JSON"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda d: change_config(d, model_type="mamba"), "is a 'mamba' model.*cannot be trained here.*Llama"),
        (lambda d: change_config(d, model_type=None), "is a None model"),
        (
            lambda d: change_config(d, architectures=["LlamaForSequenceClassification"]),
            r"is a 'llama' model \(LlamaForSequenceClassification\)",
        ),
        (lambda d: change_config(d, hidden_size="wide"), "config.json is not valid for Llama.*hidden_size"),
        (lambda d: change_config(d, num_hidden_layers=3), r"lacks 9 tensors \('model.layers.2"),
        (lambda d: change_config(d, intermediate_size=192), r"has shape \(160, 64\), but config.json implies"),
        (lambda d: change_config(d, vocab_size=400), r"'model.embed_tokens.weight' has shape \(300, 64\).*\(400, 64\)"),
        (lambda d: change_weights(d, lambda t: t.pop(NORM)), "lacks 'model.norm.weight', which the model needs"),
        (
            lambda d: change_weights(d, lambda t: t.pop(UP)),
            "lacks 'model.layers.1.mlp.up_proj.weight', which the model needs",
        ),
        (
            lambda d: change_weights(d, lambda t: t.pop("lm_head.weight")),
            "lacks 'lm_head.weight', which the model needs",
        ),
        (lambda d: change_weights(d, lambda t: t.update({NORM: torch.ones(63)})), r"has shape \(63,\).*\(64,\)"),
        (lambda d: change_weights(d, lambda t: t.update({UP: torch.ones(160, 8)})), r"up_proj.weight' has shape"),
    ],
)
def test_a_directory_that_is_no_llama_checkpoint_is_refused(copied, damage, message):
    damage(copied)
    with pytest.raises(ValueError, match=message) as error:
        load(copied)
    assert str(copied) in str(error.value)


def test_a_quantized_config_loads_without_transformers_quantizer(tiny_llama_4bit_dir):
    assert "quantization_config" in json.loads((tiny_llama_4bit_dir / "config.json").read_text())
    assert not hasattr(load_config(tiny_llama_4bit_dir), "quantization_config")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "LoRA rank r must be at least 1, got 0|`r` should be a positive integer"),
        ({"lora_alpha": 0}, "lora_alpha must be positive, got 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be positive, got nan"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout must be in \[0, 1\)"),
        ({"use_dora": True}, "has use_dora=True, which is more than a product.*leave it at its default"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights='pissa', but adapters start here as peft's default"),
        ({"init_lora_weights": "gaussian"}, "has init_lora_weights='gaussian', but adapters start here"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save=\['lm_head'\], which is more"),
        ({"bias": "all"}, "has bias='all', which is more"),
        ({"lora_bias": True}, "has lora_bias=True, which is more"),
        ({"alora_invocation_tokens": [5, 6]}, r"has alora_invocation_tokens=\[5, 6\], which is more"),
        ({"target_parameters": ["q_proj.weight"]}, r"has target_parameters=\['q_proj.weight'\], which is more"),
        ({"use_qalora": True}, "has use_qalora=True, which is more"),
        ({"layer_replication": [(0, 2), (1, 2)]}, r"has layer_replication=\[\(0, 2\), \(1, 2\)\], which is more"),
        ({"trainable_token_indices": [7]}, r"has trainable_token_indices=\[7\], which is more"),
        ({"arrow_config": ArrowConfig()}, r"has arrow_config=ArrowConfig\(.*, which is more"),
    ],
)
def test_lora_settings_that_cannot_be_trained_here_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_lora(LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.1, "bias": "none"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*v_proj": 3}},
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"exclude_modules": ["v_proj"]},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"modules_to_save": [], "target_parameters": []},
        {"revision": "main", "base_model_name_or_path": "some/base", "inference_mode": True},
        {"qalora_group_size": 8, "ensure_weight_tying": True},
    ],
    ids=lambda options: "-".join(options) or "default",
)
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
def test_every_setting_of_plain_lora_is_accepted(options, tiny_llama_dir):
    lora = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})
    assert check_lora(lora) is lora
    model = build_model(SafetensorsCheckpoint(tiny_llama_dir), lora)
    assert any(isinstance(module, LoraLinear) for module in model.modules())


def test_adapters_on_other_layers_than_projections_are_refused(tiny_llama_dir):
    for target in ("no_such_proj", "lm_head", "embed_tokens"):
        with pytest.raises(ValueError, match=target):
            build_model(SafetensorsCheckpoint(tiny_llama_dir), LoraConfig(r=4, target_modules=[target]))
    for target in ("lm_head", "embed_tokens"):  # beside one that is right
        with pytest.raises(ValueError, match=f"name '{target}', which is no projection of a decoder layer. Choose"):
            build_model(SafetensorsCheckpoint(tiny_llama_dir), LoraConfig(r=4, target_modules=["q_proj", target]))


def test_an_identity_refuses_another_base_and_other_adapters(tiny_llama_dirs):
    def identity(name: str = "untied", lora: LoraConfig | None = None) -> BaseIdentity:
        return BaseIdentity.of(SafetensorsCheckpoint(tiny_llama_dirs[name]), lora or default_lora(4))

    def changed(**options: Any) -> LoraConfig:
        lora = default_lora(4)
        for name, value in options.items():
            setattr(lora, name, value)
        return lora

    mine = identity()
    mine.check(json.loads(json.dumps(mine.to_dict())), "x")
    fewer = changed(target_modules=["q_proj"])
    for other, difference in (
        (identity("other"), "fingerprint is"),
        (identity("tied"), "fingerprint is"),
        (identity(lora=default_lora(8)), "lora_r is 8 there and 4 here; lora_alpha is 16.0 there and 8.0 here"),
        (identity(lora=default_lora(4, 5)), "lora_alpha is 5.0 there and 8.0 here"),
        (identity(lora=fewer), r"lora_targets is \['q_proj'\] there"),
        (identity(lora=changed(use_rslora=True)), "lora_use_rslora is True there and False here"),
        (identity(lora=changed(rank_pattern={"k_proj": 2})), r"lora_rank_pattern is \[\['k_proj', 2\]\] there"),
        (identity(lora=changed(alpha_pattern={"k_proj": 3})), r"lora_alpha_pattern is \[\['k_proj', 3\]\] there"),
    ):
        with pytest.raises(ValueError, match=f"x was made with another model or LoRA shape: .*{difference}"):
            mine.check(other.to_dict(), "x")
    with pytest.raises(ValueError, match="fingerprint is None there"):
        mine.check({}, "x")


def test_a_checkpoint_that_does_not_say_how_its_adapters_were_scaled_is_resumed(tiny_llama_dir):
    lora = LoraConfig(r=4, use_rslora=True, target_modules=["q_proj"], alpha_pattern={"q_proj": 3})
    identity = BaseIdentity.of(SafetensorsCheckpoint(tiny_llama_dir), lora)
    older = ("fingerprint", "hidden_size", "num_hidden_layers", "vocab_size", "lora_r", "lora_alpha", "lora_targets")
    identity.check({name: identity.to_dict()[name] for name in older}, "x")
    with pytest.raises(ValueError, match="lora_r is None there"):
        identity.check({name: identity.to_dict()[name] for name in older if name != "lora_r"}, "x")


def test_stock_llama_is_untouched(tiny_llama_dir):
    load(tiny_llama_dir)
    stock = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    assert type(stock.lm_head) is nn.Linear
    assert type(stock.model.layers[0].mlp.up_proj) is nn.Linear
