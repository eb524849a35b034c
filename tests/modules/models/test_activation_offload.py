"""Offloaded activation checkpoints: nothing else moves, the device keeps none, and every number stays as it is.

Shapes: B samples, S tokens a sample.
"""

import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.distributed.fsdp2 import FSDP2Strategy
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.models import decoder_layer
from lightning_qlora.modules.models.activation_offload import offload_to_host
from lightning_qlora.modules.models.build import build_model, materialize
from lightning_qlora.modules.models.causal_lm import QLoRAForCausalLM
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM
from lightning_qlora.modules.training.memory_plan import Settings
from tests.distributed import RankPools, groups
from tests.training import qlora

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_graphs")

#: With the graphs of the default backend, run as they are.
COMPILED = "aot_eager_decomp_partition"


def load(
    directory: Path,
    *,
    offload: bool,
    backend: Any = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> QLoRAForCausalLM:
    """A model in training mode whose adapters all matter."""
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_model(
        checkpoint, default_lora(4), dtype=dtype, checkpoint_activations=True, offload_activations=offload
    )
    if backend is not None:
        model.compile_regions(backend=backend)
    materialize(model, checkpoint, torch.device(device), seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def token_ids(*shape: int) -> Tensor:
    return torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(sum(shape)))


class LayerInputs:
    """How many inputs of decoder layers exist of those made since the last count."""

    def __init__(self, model: QLoRAForCausalLM) -> None:
        self.seen: list[weakref.ref[Any]] = []
        for layer in model.model.layers:
            layer.register_forward_pre_hook(self.note)

    @torch.compiler.disable
    def note(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.seen.append(weakref.ref(args[0].untyped_storage()))

    def count(self) -> int:
        seen, self.seen = self.seen, []
        return sum(storage() is not None for storage in seen)


# --- what moves


def test_only_the_named_tensor_moves():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    named = x + 0
    with offload_to_host(named.view(3, 4)):
        product = named * weight
        half = named[:1] * weight[:1]  # at the same address
    saved = product.grad_fn._saved_self
    assert torch.equal(saved, named)
    assert saved.data_ptr() != named.data_ptr()
    assert product.grad_fn._saved_other.data_ptr() == weight.data_ptr()
    assert half.grad_fn._saved_self.data_ptr() == named.data_ptr()
    (named * weight).sum().backward(retain_graph=True)
    expected = [x.grad, weight.grad]
    x.grad = weight.grad = None
    product.sum().backward()
    assert all(map(torch.equal, [x.grad, weight.grad], expected))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_no_layer_input_stays_and_no_number_changes(tiny_llama_dir, compiled):
    results = []
    run_graph, graphs = torch._dynamo.lookup_backend(COMPILED), {False: 0, True: 0}
    for offload in (False, True):

        def count_graph(graph: torch.fx.GraphModule, inputs: list[Tensor], offload: bool = offload) -> Any:
            graphs[offload] += 1
            return run_graph(graph, inputs)

        model = load(tiny_llama_dir, offload=offload, backend=count_graph if compiled else None)
        inputs = LayerInputs(model)
        losses = []
        for shape in ((2, 9), (3, 12)):  # whose gradients accumulate
            loss = model(token_ids(*shape), labels=token_ids(*shape)).loss
            assert inputs.count() == ((1 if compiled else 0) if offload else 2)  # compiled, the first is a leaf
            loss.backward()
            losses.append(loss.detach())
        results.append((losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert graphs[False] == graphs[True] == (3 if compiled else 0)
    assert len(results[0][1]) == 2 * 2 * 7
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_only_training_offloads(tiny_llama_dir, monkeypatch):
    model, stock = (load(tiny_llama_dir, offload=offload).eval() for offload in (True, False))
    offloads = []
    monkeypatch.setattr(
        decoder_layer, "offload_to_host", lambda tensor: offloads.append(tensor.shape) or offload_to_host(tensor)
    )
    ids = token_ids(1, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))
    assert torch.equal(model(ids, labels=ids).loss, stock(ids, labels=ids).loss)
    with torch.no_grad():
        model.train()(ids, labels=ids)
    assert offloads == []
    model(ids, labels=ids)
    assert offloads == [(1, 5, 64)] * 2


def test_there_must_be_checkpoints_to_offload(tiny_llama_dir):
    lora = default_lora(4)
    with pytest.raises(ValueError, match="Set checkpoint_activations too"):
        build_model(SafetensorsCheckpoint(tiny_llama_dir), lora, offload_activations=True)
    with pytest.raises(ValueError, match="Set checkpoint_activations too"):
        QLoRACausalLM(
            tiny_llama_dir, lora, compute=ComputeOptions(checkpoint_activations="none", offload_activations=True)
        )
    with pytest.raises(ValueError, match="Set checkpoint_activations too"):
        Settings(config=LlamaConfig(), lora=lora, batch_size=1, seq_len=8, offload_activations=True)


# --- sharded


def fit(directory: Path, device: str, offload: bool, cpu_offload: bool, backend: str | None) -> dict[str, Any]:
    """Train for 2 steps of two micro-batches; returns losses, adapters, and layer inputs before each backward."""
    torch._dynamo.reset()
    kept: list[int] = []
    losses: list[float] = []

    class Record(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert isinstance(pl_module, QLoRACausalLM)
            self.inputs = LayerInputs(pl_module._model)

        def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
            kept.append(self.inputs.count())

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step > len(losses):
                losses.append(float(trainer.callback_metrics["train_loss"]))

    compiling = {} if backend is None else {"compile": "default", "compile_backend": backend}
    module = qlora(
        directory, default_lora(4), learning_rate=1e-2, schedule="constant", checkpoint_activations=True,
        offload_activations=offload, **compiling,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator=device, devices=dist.get_world_size(), max_steps=2, accumulate_grad_batches=2,
        strategy=FSDP2Strategy(precision="32-true", cpu_offload=cpu_offload), callbacks=[Record()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, inference_mode=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    samples = [token_ids(2, 8 + 3 * i + dist.get_rank()) for i in range(4)]
    batches = [{"input_ids": ids, "labels": ids, "num_loss_tokens": ids[:, 1:].numel()} for ids in samples]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    adapters = {n: p.detach().full_tensor().cpu() for n, p in module.named_parameters() if p.requires_grad}
    return {"kept": kept, "losses": losses, "adapters": adapters}


@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_sharded_training_is_the_same(
    ranks: RankPools, tiny_llama_4bit_dir: Path, world_size: int, device: str
) -> None:
    for cpu_offload, backend in ((False, None), (True, COMPILED)):
        kept, offloaded = (
            ranks.run(world_size, device, fit, tiny_llama_4bit_dir, device, offload, cpu_offload, backend)
            for offload in (False, True)
        )
        for ours, expected in zip(offloaded, kept, strict=True):
            assert expected.pop("kept") == [2] * 4
            assert ours.pop("kept") == [0 if backend is None else 1] * 4
            assert len(ours["losses"]) == 2
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", [None, COMPILED], ids=["eager", "compiled"])
def test_a_gpu_keeps_no_layer_input(tmp_path, backend):
    """Eight inputs of 4 MiB; while a layer runs its own is there, and the first, whom the model's forward holds."""
    layers, batch, length, hidden = 8, 4, 1024, 512
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=8, vocab_size=512
        )
    ).half().save_pretrained(tmp_path)
    results, left, peaks = [], [], []
    for offload in (False, True):
        model = load(tmp_path, offload=offload, backend=backend, device="cuda", dtype=torch.float16)
        for shape in ((2, 64), (batch, length)):  # the first to compile and to get the workspaces
            ids = token_ids(*shape).cuda()
            torch.cuda.reset_peak_memory_stats()
            in_use = torch.cuda.memory_allocated()
            with sdpa_kernel(SDPBackend.MATH):  # repeatable
                with torch.autocast("cuda", torch.float16):
                    loss = model(ids, labels=ids, num_loss_tokens=ids[:, 1:].numel()).loss
                left.append(torch.cuda.memory_allocated() - in_use)
                peaks.append(torch.cuda.max_memory_allocated() - in_use)
                loss.backward()
            results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
            model.zero_grad()
        del model, loss
    one = batch * length * hidden * 2
    assert left[1] - left[3] == pytest.approx((layers - (backend is not None)) * one, rel=0.1)
    assert 0.9 * (layers - 2) * one <= peaks[1] - peaks[3] <= 1.1 * layers * one
    torch.testing.assert_close(results[:2], results[2:], rtol=0, atol=0)
