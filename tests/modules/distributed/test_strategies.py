"""A QLoRA Llama under every strategy: equal losses, one another's checkpoints, stock libraries, and clear refusals."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CPUAccelerator
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lightning_qlora.callbacks import StepCheckpoint
from lightning_qlora.modules.distributed.fsdp2 import FSDP2Strategy
from lightning_qlora.modules.distributed.strategies import OneDeviceStrategy, ReplicatedStrategy, StrategyOptions
from lightning_qlora.modules.export.merge import merge_adapter
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM
from tests.distributed import RankPools, build, groups
from tests.training import qlora

STEPS, SAVED_AT = 4, 2
#: Samples of each micro-batch; ranks take every second one. The last of a step has nothing to learn from on rank 1.
LENGTHS = [[12, 5], [7, 31], [9], []]


def batch(lengths: list[int], seed: int) -> dict[str, Any]:
    """Random samples, the first two tokens of each a prompt; without lengths the blank batch of one lonely token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(max(len(lengths), 1), max([*lengths, 1]), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 300, (length,), generator=generator)
        labels[row, 2:length] = ids[row, 2:length]
    return {"input_ids": ids, "labels": labels, "num_loss_tokens": int((labels[:, 1:] != -100).sum())}


def batches(first_step: int) -> list[dict[str, Any]]:
    """This rank's, of all steps from ``first_step`` on and then the others: four micro-batches a step, dealt to ranks.

    A plain loader begins anew after a resume, so a resumed run gets what it has not seen first.
    """
    steps = [*range(first_step, STEPS), *range(first_step)]
    dealt = [batch(lengths, seed=10 * step + i) for step in steps for i, lengths in enumerate(LENGTHS)]
    return dealt[dist.get_rank() :: dist.get_world_size()]


class Record(L.Callback):
    """Losses and gradient norms of the steps; saves after one of them."""

    def __init__(self, save: Path | None, save_at: int) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.save, self.save_at = save, save_at

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        micro_batches = len(LENGTHS) // trainer.world_size
        if (trainer.fit_loop.epoch_loop.batch_idx + 1) % micro_batches == 0:
            self.losses.append(float(trainer.callback_metrics["train_loss"]))
            self.norms.append(float(trainer.callback_metrics["grad_norm"]))
            if self.save is not None and trainer.global_step == self.save_at:
                trainer.save_checkpoint(self.save)


def train(
    model_dir: Path, name: Any, device: str, precision: str, options: dict[str, Any], save: Path | None,
    resume: Path | None, save_at: int = SAVED_AT, resume_at: int = SAVED_AT,
) -> tuple[list[float], list[float], dict[str, Tensor]]:  # fmt: skip
    """Train with activation checkpointing and clipping; returns losses, norms and the adapters.

    ``save`` is written after ``save_at`` steps; ``resume`` is of ``resume_at``.
    """
    world_size = dist.get_world_size()
    if name == "single":
        options = {**options, "devices": world_size}
    module = QLoRACausalLM(
        model_dir,
        default_lora(4),
        learning_rate=5e-3,
        schedule="constant",
        compute=ComputeOptions(checkpoint_activations=True),
    )
    record = Record(save, save_at)
    strategy = build(name, precision=precision, **options)
    trainer = L.Trainer(
        accelerator=device, devices=world_size, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, inference_mode=False,
        max_steps=STEPS, accumulate_grad_batches=len(LENGTHS) // world_size, gradient_clip_val=0.5, callbacks=[record],
    )  # fmt: skip
    base = {}

    class CheckBase(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            base.update({n: p.detach().clone() for n, p in pl_module.named_parameters() if not p.requires_grad})
            if isinstance(trainer.strategy.model, DistributedDataParallel):
                buckets = trainer.strategy.model._get_ddp_logging_data()["bucket_sizes"]
                trained = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
                assert sum(map(int, buckets.split(", "))) == trained

    trainer.callbacks.append(CheckBase())
    resumed = {} if resume is None else {"ckpt_path": resume}
    trainer.fit(module, DataLoader(batches(0 if resume is None else resume_at), batch_size=None), **resumed)
    for name_, parameter in module.named_parameters():
        if name_ in base:
            local = [getattr(t, "to_local", lambda t=t: t)().cpu() for t in (parameter.detach(), base[name_])]
            assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in local)), f"{name_} was changed"
    adapters = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    return (
        record.losses,
        record.norms,
        {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).cpu() for n, p in adapters.items()},
    )


def check_equal(found: Any, expected: Any, tolerance: float) -> None:
    count = len(found[0])
    assert 0 < count <= STEPS
    assert found[0] == pytest.approx(expected[0][-count:], rel=tolerance)
    assert found[1] == pytest.approx(expected[1][-count:], rel=max(tolerance, 1e-5))
    for name, adapter in found[2].items():
        torch.testing.assert_close(adapter, expected[2][name], rtol=1e-2, atol=max(tolerance, 1e-5))


WAYS = [("single", 1), ("ddp", 2), ("fsdp2", 2)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=groups(2)[1].marks)])
def test_all_strategies_train_alike_and_continue_one_anothers_checkpoints(
    ranks: RankPools, tiny_llama_4bit_dir: Path, tmp_path: Path, device: str
) -> None:
    whole: dict[str, Any] = {}
    for form in ("file", "sharded"):
        options = {"sharded_checkpoints": form == "sharded", "async_save": form == "sharded"}
        for name, world_size in WAYS:
            path = tmp_path / f"{name}-{form}.ckpt"
            results = ranks.run(
                world_size, device, train, tiny_llama_4bit_dir, name, device, "32-true", options, path, None
            )
            assert path.is_dir() == (form == "sharded")
            for result in results:
                assert len(result[0]) == STEPS
                check_equal(result, whole.setdefault("single", result), 1e-6)
    for name, world_size in WAYS:
        paths = [tmp_path / f"{source}-file.ckpt" for source, _ in WAYS]
        paths.append(tmp_path / f"{'single' if name == 'fsdp2' else 'fsdp2'}-sharded.ckpt")
        for path in paths:
            for result in ranks.run(
                world_size, device, train, tiny_llama_4bit_dir, name, device, "32-true", {}, None, path
            ):
                assert len(result[0]) == STEPS - SAVED_AT
                check_equal(result, whole["single"], 1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=groups(2)[1].marks)])
def test_a_run_goes_from_two_devices_to_one_and_back(
    ranks: RankPools, tiny_llama_4bit_dir: Path, tmp_path: Path, device: str
) -> None:
    common = (device, train, tiny_llama_4bit_dir, "fsdp2", device, "32-true", {})
    of_two, of_one = tmp_path / "two.ckpt", tmp_path / "one.ckpt"
    whole = ranks.run(2, *common, of_two, None)[0]
    (on_one,) = ranks.run(1, *common, of_one, of_two, 3)
    check_equal(on_one, whole, 1e-6)
    for result in ranks.run(2, *common, None, of_one, 3, 3):
        assert len(result[0]) == STEPS - 3
        check_equal(result, whole, 1e-6)


@pytest.mark.parametrize(("world_size", "device"), groups(4))
def test_hybrid_sharding_trains_a_llama_alike(
    ranks: RankPools, tiny_llama_4bit_dir: Path, tmp_path: Path, world_size: int, device: str
) -> None:
    """Four ranks as two copies in two shards; they continue what one device saved, and four plain shards theirs.

    One device does not continue the checkpoint of four: Lightning counts batches, and here it takes more for a step.
    """
    of_one, of_four = tmp_path / "one.ckpt", tmp_path / "four.ckpt"
    common, hybrid = (device, "32-true"), {"shard_size": 2, "prefetch": 1, "sharded_checkpoints": True}
    (whole,) = ranks.run(1, device, train, tiny_llama_4bit_dir, "single", *common, {}, of_one, None)
    for options, save, resume in ((hybrid, of_four, None), (hybrid, None, of_one), ({}, None, of_four)):
        for result in ranks.run(
            world_size, device, train, tiny_llama_4bit_dir, "fsdp2", *common, options, save, resume
        ):
            check_equal(result, whole, 1e-6)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=groups(2)[1].marks)])
def test_strategies_agree_in_half_precision(
    ranks: RankPools, tiny_llama_4bit_dir: Path, device: str, precision: str
) -> None:
    expected = None
    for name, world_size in WAYS:
        for result in ranks.run(
            world_size, device, train, tiny_llama_4bit_dir, name, device, precision, {}, None, None
        ):
            expected = expected or result
            assert all(map(math.isfinite, result[0]))
            assert result[0] == pytest.approx(expected[0], rel=2e-2)


# --------------------------------------------------------------------------------------------- stock libraries and back

SAMPLES = torch.randint(3, 300, (8, 1, 16), generator=torch.Generator().manual_seed(0))

#: The number of ranks, options of the strategy, and options of the module.
EVERY_WAY: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "single": (1, {"name": "single"}, {}),
    "ddp": (2, {"name": "ddp"}, {}),
    "ddp, async": (2, {"name": "ddp", "async_save": True}, {}),
    "fsdp2": (2, {"name": "fsdp2"}, {"checkpoint_activations": True}),
    "fsdp2, one rank, offload": (1, {"name": "fsdp2", "offload": True}, {}),
    "fsdp2, offload, async": (2, {"name": "fsdp2", "offload": True, "async_save": True}, {}),
    "fsdp2, sharded": (2, {"name": "fsdp2", "sharded_checkpoints": True}, {}),
    "fsdp2, sharded, async": (2, {"name": "fsdp2", "sharded_checkpoints": True, "async_save": True}, {}),
    "fsdp2, no resharding": (2, {"name": "fsdp2", "reshard_after_forward": False, "prefetch": 1}, {}),
    # aot_eager: the graphs of "inductor" without its half a minute of code generation
    "fsdp2, compiled": (2, {"name": "fsdp2"}, {"compile": "default", "compile_backend": "aot_eager"}),
    "hybrid 2 x 2": (4, {"name": "fsdp2", "shard_size": 2, "sharded_checkpoints": True, "async_save": True}, {}),
    "fsdp2, bf16-true": (2, {"name": "fsdp2", "precision": "bf16-true"}, {}),
    "fsdp2, 16-mixed": (2, {"name": "fsdp2", "precision": "16-mixed"}, {}),
    "all at once": (
        2,
        {
            "name": "fsdp2",
            "precision": "bf16-mixed",
            "offload": True,
            "prefetch": 1,
            "async_save": True,
            "sharded_checkpoints": True,
        },
        {
            "checkpoint_activations": True,
            "offload_activations": True,
            "compile": "default",
            "compile_backend": "aot_eager",
            "sliding_window": 16,
        },
    ),
}


def train_from(
    model_dir: Path, adapter: Path, directory: Path, device: str, strategy: dict[str, Any], options: dict[str, Any]
) -> tuple[list[float], Tensor]:
    """Train from ``adapter``, four samples a step, each a micro-batch; returns losses and the logits of a sample."""
    world_size = dist.get_world_size()
    module = qlora(model_dir, default_lora(4), learning_rate=1e-2, schedule="constant", init_adapter=adapter, **options)
    losses: list[float] = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step > len(losses):
                losses.append(float(trainer.callback_metrics["train_loss"]))

    trainer = L.Trainer(
        accelerator=device, devices=world_size, strategy=build(**strategy),
        max_steps=2, accumulate_grad_batches=4 // world_size, use_distributed_sampler=False, inference_mode=False,
        callbacks=[Losses(), StepCheckpoint(directory / "checkpoints", 2, adapters=directory / "adapters")],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    batches = [{"input_ids": ids, "labels": ids, "num_loss_tokens": ids.numel() - 1} for ids in SAMPLES]
    trainer.fit(module, DataLoader(batches[dist.get_rank() :: world_size], batch_size=None))
    with torch.no_grad():
        return losses, module.eval()(SAMPLES[0].to(module.device)).cpu()


@pytest.fixture(scope="module")
def stock_adapter(
    tiny_llama_4bit_dir: Path, dense_llama: Callable[[Path], LlamaForCausalLM], tmp_path_factory: Any
) -> tuple[Path, float]:
    """An adapter as peft makes it, of no small effect, and the loss of the first step by stock libraries."""
    model = get_peft_model(dense_llama(tiny_llama_4bit_dir), default_lora(4))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    directory = tmp_path_factory.mktemp("stock") / "adapter"
    model.save_pretrained(directory)
    with torch.no_grad():
        return directory, float(torch.stack([model(ids, labels=ids).loss for ids in SAMPLES[:4]]).mean())


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=groups(2)[1].marks)])
def test_adapters_and_bases_go_to_stock_libraries_and_back(
    ranks: RankPools, tiny_llama_4bit_dir: Path, stock_adapter: tuple[Path, float],
    dense_llama: Callable[[Path], LlamaForCausalLM], tmp_path: Path, device: str, way: str,
) -> None:  # fmt: skip
    """The base loads in stock transformers, alone and merged; the adapter comes from stock peft and loads there."""
    world_size, strategy, options = EVERY_WAY[way]
    if device == "cuda" and torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} CUDA GPUs")
    adapter, first_loss = stock_adapter
    results = ranks.run(
        world_size, device, train_from, tiny_llama_4bit_dir, adapter, tmp_path, device, strategy, options, timeout=240
    )
    close = 1e-4 if device == "cpu" else 1e-2  # TF32 may be on
    tolerance = {"rtol": close, "atol": close}
    trained = tmp_path / "adapters" / "step=2"
    stock = PeftModel.from_pretrained(dense_llama(tiny_llama_4bit_dir), trained).eval()
    merge_adapter(tiny_llama_4bit_dir, trained, tmp_path / "merged", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    before = PeftModel.from_pretrained(dense_llama(tiny_llama_4bit_dir), adapter).eval()
    with torch.no_grad():
        expected, of_merged, of_before = (model(SAMPLES[0]).logits for model in (stock, merged, before))
    assert (expected - of_before).abs().max() > 0.1
    torch.testing.assert_close(of_merged, expected, **tolerance)
    close = {"16-mixed": 1e-2, "bf16-mixed": 5e-2, "bf16-true": 5e-2}.get(strategy.get("precision", ""), close)
    for losses, logits in results:
        assert losses[0] == pytest.approx(first_loss, rel=close)
        assert (logits - expected).abs().max() <= close * expected.abs().max()


# --------------------------------------------------------------------------------------------------------- the function


def test_names_give_strategies() -> None:
    assert isinstance(build("fsdp2", devices=2), FSDP2Strategy)
    assert isinstance(build("ddp", devices=2), ReplicatedStrategy)
    assert isinstance(build("single"), OneDeviceStrategy)
    built = build("fsdp2", prefetch=2, shard_size=2, reshard_after_forward=False, offload=True)
    assert isinstance(built, FSDP2Strategy)
    assert (built.prefetch, built.shard_size, built.reshard_after_forward, built.cpu_offload) == (2, 2, False, True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fsdp", {}, "strategy must be 'auto', 'fsdp2', 'ddp' or 'single', got 'fsdp'"),
        ("single", {"devices": 2}, "strategy 'single' uses one device, not 2. Set devices=1, or take 'ddp'"),
        ("fsdp2", {"devices": 2, "num_nodes": 2, "shard_size": 3}, "shard_size=3 does not divide the 4 ranks"),
        ("single", {"num_nodes": 2}, "strategy 'single' uses one device, not 2"),
        ("ddp", {"offload": True}, "offload is for strategy 'fsdp2': 'ddp' shards nothing"),
        ("ddp", {"shard_size": 2}, "shard_size is for strategy 'fsdp2'"),
        ("single", {"prefetch": 1}, "prefetch is for strategy 'fsdp2': 'single' shards nothing"),
        ("single", {"reshard_after_forward": False}, "reshard_after_forward=False is for strategy 'fsdp2'"),
        ("ddp", {"precision": "8-bit"}, "Unknown precision '8-bit'. Choose auto or one of 32-true, 16-mixed"),
        ("fsdp2", {"prefetch": -1}, "prefetch must not be negative, got -1"),
        ("fsdp2", {"shard_size": 1}, "shard_size must be at least 2, got 1"),
        ("ddp", {"devices": 0}, "--devices must be at least 1, got 0"),
        ("ddp", {"num_nodes": 0}, "--num_nodes must be at least 1, got 0"),
        ("fsdp2", {"timeout_minutes": 0}, "--timeout_minutes must be at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StrategyOptions(name, **options)


def test_options_are_checked_against_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on a machine with GPUs: on purpose
    checked = StrategyOptions("ddp", devices=2).check()
    assert checked == StrategyOptions("ddp", devices=2, precision="32-true")
    assert checked.world_size == 2
    for options, message in (
        (StrategyOptions(devices=10_000), "devices=10000 processes on a machine with"),
        (StrategyOptions(num_nodes=2), "num_nodes=2 but nothing says which of these machines this is"),
    ):
        with pytest.raises(ValueError, match=message):
            options.check()


@pytest.mark.parametrize("name", ["ddp", "single"])
def test_where_nothing_is_sharded_the_model_stays_as_it_is(name: str) -> None:
    strategy = build(name)
    strategy.accelerator = CPUAccelerator()
    strategy.parallel_devices = [torch.device("cpu")]
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = dict(model.named_parameters())
    strategy.shard(model, [[model[0]], [model[1]]])
    assert type(model) is nn.Sequential
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert strategy.parameters_device == torch.device("cpu")
