"""Compiled regions: how many graphs, for which shapes, what they keep for backward, and that nothing else changes.

Graphs are counted with a backend that traces and partitions as the default one does and then runs them as they are;
code is generated in the slow tests.

Shapes: B samples, S tokens a sample.
"""

import copy
import functools
import itertools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora as peft_lora
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_and_get_code
from torch.utils.data import DataLoader

from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.distributed.fsdp2 import FSDP2Strategy
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.lora.linear import LoraLinear
from lightning_qlora.modules.models.build import build_model, materialize, restore_buffers
from lightning_qlora.modules.models.causal_lm import QLoRAForCausalLM
from lightning_qlora.modules.models.compilation import compile_region
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.quantization.nf4_linear import NF4Linear
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM
from tests.distributed import RankPools, groups
from tests.graphs import Graphs
from tests.training import qlora

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_graphs")

HIDDEN = 64  # of the tiny Llama


def load(directory: Path, lora: LoraConfig | None = None, **options: Any) -> QLoRAForCausalLM:
    """A model in training mode whose adapters all matter; compiled if a ``backend`` is given."""
    checkpoint = SafetensorsCheckpoint(directory)
    backend = options.pop("backend", None)
    model = build_model(checkpoint, lora or default_lora(4), **{"checkpoint_activations": True, **options})
    if backend is not None:
        model.compile_regions(backend=backend)
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def token_ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(100 * batch + length))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_step(compiled: QLoRAForCausalLM, eager: QLoRAForCausalLM, ids: Tensor) -> None:
    losses = [model(ids, labels=ids).loss for model in (compiled, eager)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    found, expected = gradients(compiled), gradients(eager)
    assert len(found) == 2 * 2 * 7
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# --- graphs


def test_kinds_of_layers_do_not_share_the_limit_of_graphs(tiny_llama_dir):
    """Two windows, recomputed or not: in training and validation, of one row and of more, 16 graphs, where torch allows
    8 for a function. FSDP2 makes a subclass of each layer's class."""
    checkpoint, graphs = SafetensorsCheckpoint(tiny_llama_dir), Graphs("eager")
    model = build_model(checkpoint, default_lora(4))
    layers = model.model.layers
    layers.extend(copy.deepcopy(layer) for layer in list(layers))
    model.model.config.num_hidden_layers = 4
    for layer, (window, recomputed) in zip(layers, itertools.product((None, 5), (False, True)), strict=True):
        layer.self_attn.attention_window, layer.checkpoint_activations = window, recomputed
    model.windows = (None, 5)
    model.compile_regions(backend=graphs)
    classes = {type(layer) for layer in layers}
    assert len(classes) == 4
    for cls in classes:
        assert type(f"FSDP{cls.__name__}", (cls,), {}).forward is cls.forward
    model.to_empty(device="cpu")
    restore_buffers(model, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data.view(torch.uint8).zero_()
    for shape in [(2, 9), (1, 9)]:
        ids = token_ids(*shape)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            model.eval()(input_ids=ids, labels=ids)
    assert graphs.count == 4 * 4 + 1 + 1  # and rotary embedding, last norm


@pytest.mark.parametrize(
    ("first", "backend"), [((2, 7), "aot_eager_decomp_partition"), ((1, 12), "eager")], ids=["many", "one"]
)
def test_any_shape_is_one_of_few_graphs(tiny_llama_dir, first, backend):
    """Batches of one sample, and lengths that equal the hidden size or the batch size, are what torch takes amiss."""
    graphs = Graphs(backend)
    compiled, eager = load(tiny_llama_dir, backend=graphs), load(tiny_llama_dir)
    shapes = [(2, 9), (3, 12), (1, 20), (4, HIDDEN), (1, HIDDEN), (HIDDEN, 8), (4, 4), (2, 2), (5, 33)]
    assert_same_step(compiled, eager, token_ids(*first))
    assert graphs.count == 3  # rotary embedding, both layers, last norm
    for shape in shapes:
        assert_same_step(compiled, eager, token_ids(*shape))
    assert graphs.count == 4  # and a layer of one sample, or of more

    compiled.eval(), eager.eval()
    with torch.no_grad():
        for shape in [first, *[s for s in shapes if (s[0] == 1) == (first[0] == 1)]]:
            ids = token_ids(*shape)
            torch.testing.assert_close(compiled(ids, labels=ids).loss, eager(ids, labels=ids).loss, rtol=1e-6, atol=0)
    assert graphs.count == 5  # layer without gradients; the norm then runs uncompiled


def test_logits_and_generation_compile_nothing(tiny_llama_dir):
    graphs = Graphs("eager")
    compiled, eager = load(tiny_llama_dir, backend=graphs).eval(), load(tiny_llama_dir).eval()
    ids = token_ids(1, 5)
    with torch.no_grad():
        assert torch.equal(compiled(ids).logits, eager(ids).logits)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(compiled.generate(ids, **options), eager.generate(ids, **options))
    assert graphs.count == 0
    compiled.train()(ids, labels=ids)
    assert graphs.count == 3


@pytest.mark.parametrize("mask", ["padding", "none"])
def test_a_padding_mask_is_one_more_graph_for_all_shapes(tiny_llama_dir, mask):
    graphs = Graphs("eager")
    compiled, eager = load(tiny_llama_dir, backend=graphs), load(tiny_llama_dir)
    for shape in [(2, 9), (3, 12), (4, HIDDEN)]:
        ids = token_ids(*shape)
        options = {}
        if mask == "padding":
            options["attention_mask"] = torch.ones_like(ids)
            options["attention_mask"][:, :3] = 0
        losses = [model(ids, labels=ids, **options).loss for model in (compiled, eager)]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    assert graphs.count == 3


def test_names_and_weights_stay_as_they_are(tiny_llama_dir):
    compiled, eager = load(tiny_llama_dir, backend="eager"), load(tiny_llama_dir)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert [n for n, _ in compiled.named_modules()] == [n for n, _ in eager.named_modules()]


def test_rotary_embeddings_that_depend_on_the_length_are_left_alone(tiny_llama_dir):
    checkpoint = SafetensorsCheckpoint(tiny_llama_dir)
    model = build_model(checkpoint, default_lora(4))
    model.model.rotary_emb.rope_type = "dynamic"
    graphs = Graphs("eager")
    model.compile_regions(backend=graphs)
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    ids = token_ids(2, 8)
    model(ids, labels=ids)
    assert graphs.count == 2


# --- what is kept for backward


def partitioned(graphs: list[torch.fx.GraphModule]) -> Any:
    """A backend that divides forward and backward as the default one does, and appends both to ``graphs``."""

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_a_compiled_layer_keeps_no_dequantized_weight(tiny_llama_dir, checkpoint_activations):
    layer = load(tiny_llama_dir, checkpoint_activations=checkpoint_activations).model.layers[0]
    graphs: list[torch.fx.GraphModule] = []
    compile_region(layer, backend=partitioned(graphs))
    # Few tokens: what is kept of an activation is then smaller than any weight.
    x, turn = torch.randn(2, 3, HIDDEN), (torch.randn(1, 3, 16), torch.randn(1, 3, 16))
    kept = []
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tensor.dtype != torch.uint8:  # state of the generator
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x, position_embeddings=turn)
    y.sum().backward()
    if checkpoint_activations:
        assert sorted(tuple(tensor.shape) for tensor in kept) == [(1, 3, 16), (1, 3, 16), (2, 3, HIDDEN)]
    smallest_weight = 32 * HIDDEN
    assert 0 < max(tensor.numel() for tensor in kept) <= 2 * 3 * 160 < smallest_weight

    ops = torch.ops.lightning_qlora
    counts = [
        [sum(node.target == op.default for node in graph.graph.nodes) for graph in graphs]
        for op in (ops.linear_4bit_weight, ops.linear_4bit_weight_backward)
    ]
    # Recomputed is what gradients need: not the output of down_proj.
    assert counts == [[7, 6 if checkpoint_activations else 0], [0, 7]]


# --- adapters


def note_what_joins_the_base(layer: LoraLinear) -> list[bool]:
    """Whether the adapter's product was part of the base layer's, at each call of that."""
    joined: list[bool] = []
    layer.base_layer.register_forward_pre_hook(
        lambda module, args, kwargs: joined.append("lora" in kwargs), with_kwargs=True
    )
    return joined


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize(("dropout", "training"), [(0.0, True), (0.3, True), (0.3, False)])
def test_adapters_compute_what_pefts_own_do(tiny_llama_dir, rank_stabilized, dropout, training):
    """With a scale that is no power of two, with dropout, switched off, and in mixed precision."""
    lora = LoraConfig(
        r=4, lora_alpha=6.6, lora_dropout=dropout, use_rslora=rank_stabilized, target_modules=["q_proj", "down_proj"]
    )
    layer = load(tiny_llama_dir, lora).model.layers[1].mlp.down_proj.train(training)
    assert type(layer) is LoraLinear
    joined = note_what_joins_the_base(layer)
    layer(torch.randn(2, 160))
    assert joined == [dropout == 0 or not training]
    x = torch.randn(2, 5, 160, requires_grad=True)

    def step(forward: Callable[[Tensor], Tensor], mixed: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            y = forward(x)
        weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        return y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *weights])

    for mixed, tolerance in ((False, 1e-5), (True, 3e-2)):
        ours, theirs = step(layer, mixed), step(functools.partial(peft_lora.Linear.forward, layer), mixed)
        assert len(ours) == 4
        for found, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    base = layer.base_layer(x)
    assert not torch.equal(layer(x), base)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("case", ["two adapters", "another base"])
def test_adapters_that_no_single_product_holds_compute_what_pefts_own_do(case):
    torch.manual_seed(0)
    linear = nn.Linear(40, 24)
    model = nn.ModuleDict({"proj": linear if case == "another base" else NF4Linear.from_linear(linear)})
    for name in ("default", "second"):
        config = LoraConfig(r=4, lora_alpha=6.6, target_modules=["proj"], init_lora_weights=False)
        config._register_custom_module({nn.Linear: LoraLinear})
        inject_adapter_in_model(config, model, name)
    layer = model["proj"]
    assert type(layer) is LoraLinear
    layer.set_adapter(["default", "second"] if case == "two adapters" else "second")
    joined = note_what_joins_the_base(layer)
    x = torch.randn(2, 5, 40)
    torch.testing.assert_close(layer(x), peft_lora.Linear.forward(layer, x))
    assert not any(joined)


# --- training


def samples(count: int = 4) -> list[dict[str, Any]]:
    """Micro-batches of several shapes, some tokens not counted."""
    batches = []
    for i in range(count):
        ids = token_ids(2 + i % 3, 6 + 5 * i)
        labels = ids.clone()
        labels[:, :2] = -100
        batches.append({"input_ids": ids, "labels": labels, "num_loss_tokens": int((labels[:, 1:] != -100).sum())})
    return batches


class Losses(L.Callback):
    """The training loss of every step, the last validation loss, and an answer at the end."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.val_loss, self.answer = float("nan"), ""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.val_loss = float(trainer.callback_metrics["val_loss"])

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, QLoRACausalLM)
        if trainer.enable_validation:
            self.answer = pl_module.answer("what?", max_new_tokens=4)


#: Of Inductor, for autotuning in seconds: it times two Triton kernels a matrix product, and does so in each run.
FEW_KERNELS = {"test_configs.max_mm_configs": 2, "force_disable_caches": True}


def fit(
    directory: Path, device: str, backend: str | None, precision: str = "32-true", options: Mapping[str, Any] = {},
    validate: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train for 20 steps on this process and those of its group, with other ``options`` of the module if given.

    To ``validate`` and to answer takes code of their own, which is generated as long as that for training.
    """
    torch._dynamo.reset()
    graphs = Graphs(backend) if backend is not None else None
    module_options: dict[str, Any] = {"learning_rate": 1e-2, "schedule": "constant", "seed": 3, **options}
    if graphs is not None:
        module_options |= {"compile": "default", "compile_backend": graphs}
    module = qlora(directory, default_lora(4), checkpoint_activations=True, **module_options)
    record = Losses()
    trainer = L.Trainer(
        accelerator=device, devices=dist.get_world_size() if dist.is_initialized() else 1,
        strategy=FSDP2Strategy(precision=precision), max_epochs=5, callbacks=[record], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, inference_mode=False,
        num_sanity_val_steps=0, use_distributed_sampler=False, default_root_dir=os.devnull,
        limit_val_batches=None if validate else 0,
    )  # fmt: skip
    loaders = [DataLoader(samples(), batch_size=None), DataLoader(samples(2), batch_size=None)]
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(FEW_KERNELS):
        trainer.fit(module, *loaders)
    return {
        "graphs": graphs.count if graphs else 0,
        "all_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],  # those of the loss too
        "autotuned": torch._dynamo.utils.counters["inductor"]["select_algorithm_autotune"],
        "losses": record.losses,
        "val_loss": record.val_loss,
        "answer": record.answer,
    }


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")
# One device on the CPU is tests/recipes/test_compile_qlora.py.
@pytest.mark.parametrize(("world_size", "device"), [*groups(1)[1:], *groups(2)])
def test_twenty_steps_are_those_of_the_uncompiled_model(
    ranks: RankPools, tiny_llama_dir: Path, world_size: int, device: str
) -> None:
    compiled, eager = (
        ranks.run(world_size, device, fit, tiny_llama_dir, device, backend, "32-true", {}, True, timeout=300)
        for backend in ("aot_eager_decomp_partition", None)
    )
    for ours, expected in zip(compiled, eager, strict=True):
        assert len(expected["losses"]) == 20
        assert expected["losses"][-1] < 0.9 * expected["losses"][3]
        assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert ours["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
        assert ours["answer"] == expected["answer"]
        assert ours["graphs"] == 3 + 1  # training and validation


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "device"), groups(1))
def test_generated_code_trains_as_the_uncompiled_model(
    ranks: RankPools, tiny_llama_dir: Path, world_size: int, device: str
) -> None:
    """In mixed precision within three times the noise, where a learning rate 10 % higher is not.

    Noise is what two uncompiled runs are apart that differ in rounding only: one has attention in plain products. In
    float32 the recipe compile_qlora compares them, which ``.ci/run`` runs.
    """

    def losses(backend: str | None, **options: Any) -> list[float]:
        run = ranks.run(world_size, device, fit, tiny_llama_dir, device, backend, "bf16-mixed", options, timeout=300)
        return run[0]["losses"]

    def distance(run: list[float]) -> float:
        return mean(abs(a - b) / b for a, b in zip(run, eager, strict=True))

    eager = losses(None)
    noise = distance(losses(None, attention="eager"))
    assert 1e-5 < noise < 1e-2
    compiled, wrong = losses("inductor"), losses(None, learning_rate=1.1e-2)
    assert 0 < distance(compiled) < 3 * noise < distance(wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_max_autotune_trains_with_as_many_graphs(ranks: RankPools, tiny_llama_dir: Path) -> None:
    eager, default, tuned = (
        ranks.run(1, "cuda", fit, tiny_llama_dir, "cuda", None, "32-true", {"compile": mode}, timeout=300)[0]
        for mode in ("off", "default", "max-autotune")
    )
    assert tuned["losses"] == pytest.approx(eager["losses"], rel=1e-5)
    assert default["autotuned"] == 0 < tuned["autotuned"]
    assert tuned["all_graphs"] == default["all_graphs"] > eager["all_graphs"]  # uncompiled, it is the loss's


def test_dropout_is_the_same_in_forward_and_in_the_recomputation(tiny_llama_dir):
    """The output is linear in B of down_proj, so <dB, B> is what B adds to it, but only under one and the same mask."""
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["down_proj"])
    layer = load(tiny_llama_dir, lora).model.layers[0]
    compile_region(layer, backend="aot_eager_decomp_partition")
    x, turn = torch.randn(2, 5, HIDDEN), (torch.randn(1, 5, 16), torch.randn(1, 5, 16))
    weight = layer.mlp.down_proj.lora_B["default"].weight

    def total() -> Tensor:
        torch.manual_seed(7)
        return (layer(x, position_embeddings=turn) * torch.linspace(-1, 2, HIDDEN)).sum()

    value = total()
    value.backward()
    gradient, adapter = weight.grad, weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    added = value - total()
    assert abs(added) > 0.1
    torch.testing.assert_close((gradient * adapter).sum(), added, rtol=1e-3, atol=1e-4)


# --- the default backend


def steps_of(layer: nn.Module, shapes: list[tuple[int, int]]) -> list[Any]:
    """Output and all gradients of a decoder layer, for inputs of each shape [B, S]."""
    found = []
    for batch, length in shapes:
        torch.manual_seed(length)
        x = torch.randn(batch, length, HIDDEN, requires_grad=True)
        y = layer(x, position_embeddings=(torch.randn(1, length, 16), torch.randn(1, length, 16)))
        y.square().mean().backward()
        found.append((y.detach(), x.grad, gradients(layer)))
        assert len(found[-1][2]) == 2 * 7
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_inductor_computes_the_same_layer(tiny_llama_dir, mode):
    """Forward, recomputation and backward of whole layers are one graph for all lengths, however it is tuned.

    Products of adapters are added to the buffer that the base's product was written to: in forward, recomputation and
    backward, without a copy.
    """
    compiled, eager = (load(tiny_llama_dir).model.layers[0] for _ in range(2))
    compile_region(compiled, mode)
    shapes = [(2, 5), (3, 7), (2, HIDDEN)]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._inductor.config.patch(force_disable_caches=mode == "default"):  # which would give no code to look at
        found, codes = run_and_get_code(steps_of, compiled, shapes)
    torch.testing.assert_close(found, steps_of(eager, shapes), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    if mode != "default":
        return
    sums = []
    for code in codes:
        written = re.findall(r"extern_kernels\.mm\(.*out=(buf\d+)\)|add_product_\.default\(\w*\(?(buf\d+),", code)
        products, added = ([pair[i] for pair in written if pair[i]] for i in (0, 1))
        assert set(added) <= set(products)
        sums.append(len(added))
    assert sums == [7, 6 + 7]  # recomputed is what gradients need: not the output of down_proj


# --- refusals


def test_an_unknown_mode_is_refused(tiny_llama_dir):
    with pytest.raises(ValueError, match="compile must be one of 'off', 'default', 'max-autotune', got 'fast'"):
        QLoRACausalLM(tiny_llama_dir, compute=ComputeOptions(compile="fast"))  # type: ignore[arg-type]


def test_a_mode_that_the_backend_does_not_know_is_refused(tiny_llama_dir):
    with pytest.raises(ValueError, match="compile='max-autotune' is a mode of Inductor, which backend 'aot_eager'"):
        compile_region(load(tiny_llama_dir).model.layers[0], "max-autotune", backend="aot_eager")


class WithoutForward(nn.Linear):
    pass


@pytest.mark.parametrize("cls", [nn.Linear, WithoutForward])
def test_a_module_that_torch_would_not_compile_is_refused(cls):
    with pytest.raises(ValueError, match=f"would leave {cls.__name__} as it is, because its forward is torch's own"):
        compile_region(cls(2, 2))
    module = nn.Linear(2, 2)
    compile_region(module, "off")
    assert module._compiled_call_impl is None
