"""The plan against what a model really holds, keeps and needs, tensor by tensor."""

import contextlib
import dataclasses
import functools
import gc
import itertools
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_qlora.modules.attention.sdpa import sdpa_backend
from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.dtensor import local_tensor
from lightning_qlora.modules.hardware import capabilities, compute_dtype
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.lora.linear import adapters_off
from lightning_qlora.modules.losses import token_log_probs
from lightning_qlora.modules.models.build import build_model, materialize
from lightning_qlora.modules.models.causal_lm import QLoRAForCausalLM
from lightning_qlora.modules.models.families import load_config
from lightning_qlora.modules.quantization.nf4_linear import NF4Linear
from lightning_qlora.modules.training.memory_plan import (
    CONTEXT_BYTES,
    GIB,
    MemoryPlan,
    Settings,
    plan_memory,
)
from lightning_qlora.modules.training.optimizer import ShardAdamW
from tests.distributed import groups
from tests.training import LLAMA_8B

pytestmark = pytest.mark.usefixtures("one_thread")

LORAS = {
    "all layers": default_lora(6),
    "some layers": LoraConfig(r=5, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 3}),
    "one layer": LoraConfig(r=5, target_modules=["up_proj"], layers_to_transform=[1]),
    "by name": LoraConfig(r=5, target_modules="all-linear"),
}


# ----------------------------------------------------------------------------------------------- what a rank holds


def held(directory: Path, lora: LoraConfig, device: str) -> dict[str, int]:
    """Bytes on this rank of a loaded model and of its optimizer after a step."""
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_model(checkpoint, lora)
    if dist.is_initialized():
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for group in [*model.shard_groups(), [model]]:
            fully_shard(group, mesh=mesh)
    root = torch.device(device, dist.get_rank()) if device == "cuda" else torch.device(device)
    materialize(model, checkpoint, root, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = ShardAdamW(trained)
    optimizer.step()
    layers = {id(p) for p in model.model.layers.parameters() if not p.requires_grad}
    return {
        "4-bit layers": size(p for p in model.parameters() if id(p) in layers),
        "embeddings and head": size(p for p in model.parameters() if id(p) not in layers and not p.requires_grad),
        "adapters": size(trained),
        "optimizer state": size(t for state in optimizer.state.values() for n, t in state.items() if n != "step"),
        "statistics": size(b for m in model.modules() if isinstance(m, NF4Linear) for b in m.buffers()),
        "gradients": size(p.grad for p in trained),
    }


def size(tensors: Iterable[Tensor]) -> int:
    return sum(local_tensor(t).numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("source", ["untied", "tied", "biased"])
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS.keys())
def test_what_one_device_holds_is_exact(lora, source, tiny_llama_dirs):
    directory = tiny_llama_dirs[source]
    settings = Settings(config=load_config(directory), lora=lora, batch_size=1, seq_len=8, precision="32-true")
    assert plan_memory(settings).moments["step"] == held(directory, lora, "cpu")


@pytest.mark.parametrize("source", ["untied", "tied"])
@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_what_a_rank_holds_is_exact(ranks, world_size, device, source, tiny_llama_dirs):
    directory, lora = tiny_llama_dirs[source], default_lora(5)  # rows that 2 does not divide
    settings = Settings(
        config=load_config(directory), lora=lora, batch_size=1, seq_len=8, precision="32-true",
        world_size=world_size,
    )  # fmt: skip
    found = ranks.run(world_size, device, held, directory, lora, device)
    expected = plan_memory(settings).moments["step"]
    assert found[0] == expected
    assert all(rank[part] <= expected[part] for rank in found for part in rank)

    ddp = plan_memory(dataclasses.replace(settings, strategy="ddp")).moments["step"]
    assert ddp == plan_memory(dataclasses.replace(settings, world_size=1)).moments["step"]
    hybrid = plan_memory(dataclasses.replace(settings, world_size=4 * world_size, shard_size=world_size))
    assert hybrid.moments["step"] == expected


# ------------------------------------------------------------------------------------- what a step keeps and needs


def save_random(config: LlamaConfig, directory: str) -> None:
    """A checkpoint of random weights."""
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    save_file({name: torch.randn(shape).div(20).half() for name, shape in shapes.items()}, f"{directory}/m.safetensors")


def build(settings: Settings, device: str, saved: str | None = None) -> QLoRAForCausalLM:
    """A model of random weights (those ``saved``, if given), in the way of training."""
    dtype = compute_dtype(settings.precision)
    with tempfile.TemporaryDirectory() as directory:
        if saved is None:
            save_random(settings.config, directory)
        checkpoint = SafetensorsCheckpoint(saved or directory)
        model = build_model(
            checkpoint, settings.lora, dtype=dtype, attention=sdpa_backend(settings.compute_capability, dtype),
            checkpoint_activations=settings.checkpoint_activations,
            offload_activations=settings.offload_activations,
        )  # fmt: skip
        if settings.compile:
            model.compile_regions()
        materialize(model, checkpoint, torch.device(device), seed=0)
        checkpoint.close()
    for parameter in model.parameters():
        if parameter.requires_grad and settings.precision == "bf16-true":
            parameter.data = parameter.data.bfloat16()
    return model.train()


def forward(model: nn.Module, settings: Settings, ids: Tensor) -> Tensor:
    autocast: Any = contextlib.nullcontext()
    if settings.precision.endswith("mixed"):
        autocast = torch.autocast(ids.device.type, compute_dtype(settings.precision))
    with autocast:
        loss: Tensor = model(
            input_ids=ids, labels=ids, num_items_in_batch=1, num_loss_tokens=ids[:, 1:].numel()
        ).loss  # fmt: skip
    return loss


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operations make while this is entered and that still exist; ``peak``, the most."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        super().__init__()
        self.seen = {t.untyped_storage()._cdata for t in ignored}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return result

    def forget(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.now -= nbytes


def measure(settings: Settings) -> tuple[int, int, int]:
    """Bytes that a forward leaves to its backward, the most in backward, and the most of all, beyond the model."""
    model = build(settings, "cpu")
    ids = torch.zeros(settings.batch_size, settings.seq_len, dtype=torch.long)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        loss = forward(model, settings, ids)
        kept, peak_of_forward, live.peak = live.now, live.peak, 0
        loss.backward()
    return kept, live.peak, max(peak_of_forward, live.peak)


def planned(plan: MemoryPlan) -> tuple[int, int, int]:
    """The plan's figures for :func:`measure`, which looks at what is kept outside autocast."""
    s, step, loss = plan.settings, plan.moments["step"], plan.moments["loss"]
    norm_and_hidden = s.batch_size * s.seq_len * s.config.hidden_size * (2 * compute_dtype(s.precision).itemsize + 4)
    resident = sum(step.values()) - step["gradients"]
    backward = sum(plan.moments["backward"].values()) - resident
    forward = sum(loss.values()) - resident
    return loss["activations"] + norm_and_hidden, backward, max(forward, backward)


def test_autocast_keeps_no_copies_of_recomputed_layers():
    settings = settings_of("tied", precision="bf16-mixed", checkpoint_activations=True)
    model = build(settings, "cpu")
    ids = torch.zeros(settings.batch_size, settings.seq_len, dtype=torch.long)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(model, settings, ids)
            inside = live.now
        assert inside == live.now > 0
    assert loss.requires_grad


SHAPES = {
    "grouped heads": {"hidden_size": 256, "intermediate_size": 896, "num_key_value_heads": 2},
    "equal heads": {"hidden_size": 192, "intermediate_size": 512, "num_key_value_heads": 8},
    "narrow heads": {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4, "head_dim": 16},
    "tied": {"hidden_size": 128, "intermediate_size": 640, "num_key_value_heads": 4, "tie_word_embeddings": True},
}


def settings_of(shape: str, **options: Any) -> Settings:
    config = LlamaConfig(num_hidden_layers=3, num_attention_heads=8, vocab_size=512, **SHAPES[shape])
    return Settings(**{"config": config, "lora": default_lora(16), "batch_size": 2, "seq_len": 384, **options})


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("shape", "precision"),
    # In bf16-true nothing is cast, so that all but the sizes of values is as in float32.
    [*itertools.product(SHAPES, ["32-true", "bf16-mixed"]), ("grouped heads", "bf16-true"), ("tied", "bf16-true")],
)
def test_what_a_step_keeps_and_needs(shape, precision, checkpointing):
    settings = settings_of(shape, precision=precision, checkpoint_activations=checkpointing)
    assert planned(plan_memory(settings)) == pytest.approx(measure(settings), rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_pairs_take_what_their_documents_do_and_their_reference_no_more(checkpointing):
    """The plan of a preference loss is that of two documents per pair: the pass of the reference is never the peak."""
    settings = settings_of("grouped heads", checkpoint_activations=checkpointing)
    model = build(settings, "cpu")
    model.lm_head.loss, model.lm_head.reduction = token_log_probs, "none"
    ids = torch.zeros(settings.batch_size, settings.seq_len, dtype=torch.long)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with torch.no_grad(), adapters_off(model):
            reference = forward(model, settings, ids).sum(-1)
        left, peak_of_reference, live.peak = live.now, live.peak, 0
        chosen, rejected = (forward(model, settings, ids).sum(-1) - reference).unbind()
        torch.nn.functional.logsigmoid(chosen - rejected).neg().backward()
    needed = planned(plan_memory(settings))[2]
    assert left < 0.01 * live.peak  # sums of log-probabilities, and what torch caches
    assert peak_of_reference < live.peak == pytest.approx(needed, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_dropout_keeps_an_input_for_each_projection(precision, checkpointing):
    lora = default_lora(16, 32, 0.05)
    settings = settings_of("grouped heads", precision=precision, lora=lora, checkpoint_activations=checkpointing)
    assert planned(plan_memory(settings)) == pytest.approx(measure(settings), rel=0.06)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=16, target_modules=["q_proj", "v_proj"]),
        LoraConfig(r=64, target_modules=["o_proj", "gate_proj", "down_proj"], rank_pattern={"o_proj": 8}),
    ],
    ids=["attention", "patterns"],
)
def test_adapters_on_some_projections(lora, precision):
    settings = settings_of("grouped heads", precision=precision, lora=lora)
    assert planned(plan_memory(settings)) == pytest.approx(measure(settings), rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_without_flash_attention_keys_and_values_are_as_wide_as_queries(precision, checkpointing):
    settings = settings_of(
        "grouped heads", precision=precision, checkpoint_activations=checkpointing, compute_capability=(7, 5)
    )
    plan, grouped = (plan_memory(dataclasses.replace(settings, compute_capability=c)) for c in ((7, 5), None))
    kept, backward, _ = planned(plan)
    assert (kept, backward) == pytest.approx(measure(settings)[:2], rel=0.05)
    wider = 2 * 3 / 4 * 256 * 2 * 384 * compute_dtype(precision).itemsize  # both, but 2 of 8 heads were there
    if checkpointing:
        assert kept == planned(grouped)[0]
        assert backward - planned(grouped)[1] == wider
    else:
        assert kept - planned(grouped)[0] == 3 * wider
    assert plan.moments["step"]["workspace"] == 2 * 8320 * 1024


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_offloaded_activations_are_on_the_host(precision):
    """On a CPU the host is the device: all copies count, and what they were made of is gone."""
    # Accumulating, for then all gradients are there at any time.
    settings = settings_of("grouped heads", precision=precision, checkpoint_activations=True, accumulate=2)
    offloading = dataclasses.replace(settings, offload_activations=True)
    assert measure(offloading)[:2] == pytest.approx(measure(settings)[:2], rel=1e-3)
    here, there = plan_memory(settings), plan_memory(offloading)
    one = 2 * 384 * 256 * compute_dtype(precision).itemsize
    assert (here.host_bytes, there.host_bytes) == (0, 3 * one)
    assert here.moments["loss"]["activations"] - there.moments["loss"]["activations"] == 3 * one
    # While a layer is differentiated its own input is back, and compiled the first layer's has never left.
    assert here.moments["backward"]["activations"] - there.moments["backward"]["activations"] == 2 * one
    compiled = plan_memory(dataclasses.replace(offloading, compile=True))
    for moment in ("loss", "backward"):
        assert compiled.moments[moment]["activations"] - there.moments[moment]["activations"] == one
    assert there.moments["step"] == here.moments["step"]


ACTIVATIONS: dict[str, dict[str, bool]] = {
    "kept": {},
    "recomputed": {"checkpoint_activations": True},
    "offloaded": {"checkpoint_activations": True, "offload_activations": True},
}


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("vocab_size", [1024, 128256])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_allocates_what_is_planned(vocab_size, precision, activations):
    if precision == "bf16-mixed" and not capabilities().bf16:
        pytest.skip("needs bf16 arithmetic (compute capability 8.0)")
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=6, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=vocab_size, tie_word_embeddings=True,
    )  # fmt: skip
    settings = Settings(
        config=config, lora=default_lora(64), batch_size=2, seq_len=1024, precision=precision,
        compute_capability=torch.cuda.get_device_capability(), **ACTIVATIONS[activations],
    )  # fmt: skip
    plan = plan_memory(settings)
    assert plan.total_bytes == pytest.approx(allocated_by_steps(settings)[0], rel=0.1), plan.table()


def allocated_by_steps(settings: Settings, saved: str | None = None) -> tuple[int, int]:
    """The most bytes that three steps allocate and reserve on a GPU."""
    gc.collect()  # the model of the test before
    torch._C._cuda_clearCublasWorkspaces()  # of an earlier test, and part of the plan
    torch.cuda.empty_cache()
    in_use, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    retries = 0
    model = build(settings, "cuda", saved)
    optimizer = ShardAdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.zeros(settings.batch_size, settings.seq_len, dtype=torch.long, device="cuda")
    for step in range(3):
        if step == 1:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            retries = torch.cuda.memory_stats()["num_alloc_retries"]
        forward(model, settings, ids).backward()
        optimizer.step()
        optimizer.zero_grad()  # here as in QLoRACausalLM's
    assert not torch.cuda.memory_stats()["num_alloc_retries"] - retries, "the allocator had to free cached memory"
    return torch.cuda.max_memory_allocated() - in_use, torch.cuda.max_memory_reserved() - reserved


@contextlib.contextmanager
def allocator_held_to(nbytes: int) -> Iterator[None]:
    """PyTorch may reserve ``nbytes`` beside what it has now; more raises OutOfMemoryError."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + nbytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


#: Hidden and intermediate size, layers, heads, vocabulary.
GPU_SHAPES = {
    "wide": (2048, 8192, 8, 32, 32000),
    "narrow": (1024, 2816, 16, 16, 49152),
    "big head": (1536, 6144, 6, 12, 128256),
}
GPU_BATCHES = [(1, 2048, 64), (2, 2048, 16), (4, 1024, 64), (1, 8192, 16), (8, 512, 64)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_auto_recomputes_as_few_layers_as_the_limit_demands(tmp_path, shape, compiled):
    """A run held to its limit, as recipes hold theirs, fits without freeing cached memory on the way."""
    hidden, intermediate, layers, heads, vocab_size = GPU_SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 4, vocab_size=vocab_size,
    )  # fmt: skip
    save_random(config, str(tmp_path))
    for number, (batch_size, seq_len, rank) in enumerate(GPU_BATCHES):
        settings = Settings(
            config=config, lora=default_lora(rank), batch_size=batch_size, seq_len=seq_len, precision="bf16-mixed",
            compile=compiled, compute_capability=torch.cuda.get_device_capability(), checkpoint_activations="auto",
        )  # fmt: skip
        least, most = (
            plan_memory(dataclasses.replace(settings, checkpoint_activations=choice)).device_bytes
            for choice in ("all", "none")
        )
        limit = int(least + (0.15 + 0.2 * number) * (most - least))
        plan = plan_memory(dataclasses.replace(settings, limit_bytes=limit))
        with allocator_held_to(limit - CONTEXT_BYTES):
            allocated, reserved = allocated_by_steps(plan.settings, str(tmp_path))
        print(
            f"{shape}, {'compiled' if compiled else 'eager'}, {batch_size} x {seq_len}, r {rank}: {plan.checkpointing} "
            f"Planned {plan.total_bytes / GIB:.3f} at {plan.peak}, allocated {allocated / GIB:.3f}, reserved "
            f"{reserved / GIB:.3f} GiB."
        )
        assert 0 < plan.settings.recomputed < layers
        assert reserved + CONTEXT_BYTES <= limit, plan.table()
        assert allocated == pytest.approx(plan.total_bytes, rel=0.1), plan.table()


# ------------------------------------------------------------------------------------------- what sharding gathers


@functools.cache
def settings_8b() -> Settings:
    """Its 32 layers are built once: that takes a second."""
    return Settings(config=LLAMA_8B, lora=default_lora(64), batch_size=1, seq_len=2048, world_size=2)


def plan_8b(**options: Any) -> MemoryPlan:
    return plan_memory(dataclasses.replace(settings_8b(), **options))


def test_a_gathered_group_is_there_twice():
    plan = plan_8b(checkpoint_activations=True)
    projections = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 3}
    layer = sum(
        count * (n * k // 2 + n * k // 64 + 4 * 64 * (n + k)) for (n, k), count in projections.items()
    ) + 2 * 2 * 4096  # fmt: skip
    assert plan.moments["backward"]["gathered layers"] == 2 * layer
    assert plan.moments["loss"]["gathered head"] == 2 * 2 * 128256 * 4096
    kept = plan_8b(checkpoint_activations=True, reshard_after_forward=False)
    assert kept.moments["backward"]["gathered layers"] == 32 * layer
    ahead = plan_8b(checkpoint_activations=True, prefetch=3)
    assert ahead.moments["backward"]["gathered layers"] == 4 * layer
    alone = plan_8b(world_size=1)
    assert not any("gathered" in part for parts in alone.moments.values() for part in parts)


def test_offload_leaves_layers_and_adapters_to_the_host():
    plan, here = plan_8b(offload=True), plan_8b()
    assert set(plan.moments["step"]) == {"statistics"}
    parts = ("4-bit layers", "embeddings and head", "adapters", "optimizer state", "gradients")
    assert plan.host_bytes == sum(here.moments["step"][part] for part in parts)
    assert here.host_bytes == 0
    assert "In host memory of each process: 3.9" in plan.table()


def test_pinned_memory_is_a_power_of_two():
    rank = {"checkpoint_activations": True, "offload_activations": True, "compute_capability": (7, 5)}
    plan = plan_8b(**rank, seq_len=2049)
    assert plan.host_bytes == 32 * 32 * 2**20
    assert "In host memory of each process: 1.00 GiB." in plan.table()
    both = plan_8b(**rank, offload=True)
    assert both.host_bytes == plan_8b(offload=True).host_bytes + 32 * 16 * 2**20


def test_a_compiled_layer_needs_as_much():
    eager, compiled = plan_8b(checkpoint_activations=True), plan_8b(checkpoint_activations=True, compile=True)
    assert compiled.moments == eager.moments


def test_gradients_stay_unsharded_while_they_accumulate():
    once, often = plan_8b(), plan_8b(accumulate=4)
    assert "gradients" not in once.moments["loss"]  # those of the last step are gone,
    assert "gradients" not in once.moments["backward"]  # and in the last layers' backward there are none
    assert (
        often.moments["backward"]["gradients"]
        == often.moments["loss"]["gradients"]
        == 2 * once.moments["step"]["gradients"]
    )
    assert plan_8b(strategy="ddp").moments["loss"]["gradients"] == 2 * once.moments["step"]["gradients"]


# ------------------------------------------------------------------------------------------------- what it tells


def test_the_table_sums_up():
    plan = plan_8b(checkpoint_activations=True)
    lines = plan.table().splitlines()
    names = [line[: len(max(plan.moments["loss"], key=len)) + 2].strip() for line in lines]
    assert set(plan.parts) <= set(names)
    total = next(line for line in lines if line.startswith("total")).split()[1:]
    assert [float(cell) for cell in total] == pytest.approx(
        [sum(parts.values()) / GIB for parts in plan.moments.values()], abs=1e-3
    )
    assert f"{plan.peak}*" in lines[0]
    assert plan.total_bytes == max(sum(parts.values()) for parts in plan.moments.values()) == sum(plan.parts.values())


def test_the_flags_that_are_named_do_fit():
    plan = plan_8b(world_size=1, batch_size=8, compute_capability=(8, 0))
    assert plan.check(200 * GIB) is None
    message = plan.check(24 * GIB)
    assert message is not None
    assert message.startswith(f"Training needs about {plan.device_bytes / GIB:.1f} GiB on each device, which has 24.0")
    assert plan.fitting_flags(24 * GIB) == [
        "--checkpoint_activations", "--batch_size 1", "--seq_len 256",
    ]  # fmt: skip
    for changes in ({"checkpoint_activations": True}, {"batch_size": 1}, {"seq_len": 256}):
        assert plan_memory(dataclasses.replace(plan.settings, **changes)).device_bytes <= 24 * GIB
    # The mildest of each kind, and only what is enough.
    for changes in ({"batch_size": 2}, {"seq_len": 512}, {"offload": True}, {"world_size": 8}):
        assert plan_memory(dataclasses.replace(plan.settings, **changes)).device_bytes > 24 * GIB
    combined = plan.fitting_flags(10 * GIB)
    assert combined
    assert all(flags.startswith("--checkpoint_activations --") for flags in combined)
    assert plan.fitting_flags(CONTEXT_BYTES) == []
    assert "No combination of" in str(plan.check(CONTEXT_BYTES))


def test_checkpoints_go_to_the_host_where_recomputing_is_not_enough():
    long = {"seq_len": 32768, "compute_capability": (8, 0)}
    kept = plan_8b(**long)
    recomputed, offloaded = (plan_8b(**long, **ACTIVATIONS[name]) for name in ("recomputed", "offloaded"))
    assert kept.fitting_flags(recomputed.device_bytes)[0] == "--checkpoint_activations"
    assert kept.fitting_flags(offloaded.device_bytes)[0] == "--checkpoint_activations --offload_activations"
    flags = recomputed.fitting_flags(offloaded.device_bytes)
    assert flags[0] == "--offload_activations"
    assert "--checkpoint_activations" not in " ".join(flags)
    assert not any("offload_activations" in flag for flag in offloaded.fitting_flags(offloaded.device_bytes - GIB))


def test_a_single_device_or_ddp_is_told_about_sharding():
    assert "--strategy fsdp2" in plan_8b(strategy="ddp", checkpoint_activations=True).fitting_flags(8 * GIB)
    single = plan_8b(strategy="single", world_size=1, checkpoint_activations=True)
    assert "--offload --strategy fsdp2" in single.fitting_flags(5 * GIB)


@pytest.mark.parametrize("name", ["batch_size", "seq_len", "world_size", "accumulate"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        plan_8b(**{name: 0})
