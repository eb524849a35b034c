"""4-bit layers and the strategy on 2 and 3 ranks, each against the same thing on one.

Bytes are compared, not values: bit patterns of packed weights include NaNs of every kind.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_qlora.modules.checkpoints.demo_model import DEMO_MODEL
from lightning_qlora.modules.checkpoints.resolve import resolve_model
from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.distributed.fsdp2 import FSDP2Strategy
from lightning_qlora.modules.distributed.strategies import ReplicatedStrategy
from lightning_qlora.modules.distributed.trained_checkpoints import read_checkpoint
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.models.build import build_model, materialize
from lightning_qlora.modules.models.families import load_config
from lightning_qlora.modules.quantization.nf4_linear import NF4Linear, Quantized4bit
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM
from tests.distributed import RankPools, groups


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8)


# ------------------------------------------------------------------------------------------- bytes through fully_shard

#: Signalling and quiet NaNs, infinities and subnormals, of float32, float16 and bfloat16 (little endian).
SPECIAL_BYTES = (
    b"\x01\x00\x80\x7f\x00\x00\xa0\xff\x00\x00\xc0\x7f\xff\xff\xff\xff\x00\x00\x80\xff\x01\x00\x00\x00"
    b"\x01\x7c\x00\x7d\xff\xfd\x00\x7e\x00\xfc\x01\x00\x81\x7f\x90\xff\xc0\x7f\x80\xff"
)


def random_bytes(count: int, generator: torch.Generator) -> Tensor:
    """All 256 values and the special patterns, as far as ``count`` reaches, then random."""
    head = torch.tensor(list(SPECIAL_BYTES) + list(range(256)), dtype=torch.uint8)
    tail = torch.randint(0, 256, (max(0, count - head.numel()),), dtype=torch.uint8, generator=generator)
    return torch.cat([head, tail])[:count]


class Block(nn.Module):
    """Two 4-bit layers of random bytes, with rows that no number of ranks divides, and a trained float32 vector.

    ``mixed`` adds parameters of other dtypes: FSDP then gathers the group as bytes instead of as float32.
    """

    def __init__(self, generator: torch.Generator, mixed: bool) -> None:
        super().__init__()
        self.nested = self._layer(64, 65, generator, nested=True)
        self.plain = self._layer(64, 5, generator, nested=False)  # fewer rows than some groups have ranks x 2
        self.trained = nn.Parameter(torch.ones(64))
        if mixed:
            self.norm = nn.Parameter(torch.randn(13, generator=generator).bfloat16(), requires_grad=False)
            self.bias = nn.Parameter(torch.randn(7, generator=generator).half(), requires_grad=False)

    @staticmethod
    def _layer(k: int, n: int, generator: torch.Generator, nested: bool) -> NF4Linear:
        packed, blocks = random_bytes(n * k // 2, generator), n * k // 64
        if nested:
            absmax, absmax2 = random_bytes(blocks, generator), torch.rand(-(-blocks // 256), generator=generator)
            code2, offset = torch.rand(256, generator=generator), torch.rand((), generator=generator)
            return NF4Linear.from_quantized(Quantized4bit(packed, absmax, code2, absmax2, offset, (n, k)))
        absmax = random_bytes(4 * blocks, generator).view(torch.float32)
        return NF4Linear.from_quantized(Quantized4bit(packed, absmax, None, None, None, (n, k)))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.trained
        return x + self.nested(x).sum() + self.plain(x).sum()


def check_bytes(device: str, mixed: bool, offload: bool, reshard: bool, policy: MixedPrecisionPolicy) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(Block(generator, mixed), Block(generator, mixed)).to(device)
    expected = {name: as_bytes(parameter).clone() for name, parameter in model.named_parameters()}
    seen: Counter[tuple[str, str]] = Counter()

    def watch(name: str, layer: NF4Linear) -> None:
        def compare(when: str) -> None:
            for part in ("weight", "absmax"):
                assert not isinstance(layer.get_parameter(part), DTensor)
                assert torch.equal(as_bytes(layer.get_parameter(part)), expected[f"{name}.{part}"]), (when, name, part)
            seen[when, name] += 1

        layer.register_forward_pre_hook(lambda *_: compare("forward"))
        layer.register_full_backward_pre_hook(lambda *_: compare("backward"))

    for name, layer in model.named_modules():
        if isinstance(layer, NF4Linear):
            watch(name, layer)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    offload_policy = CPUOffloadPolicy(pin_memory=device == "cuda") if offload else OffloadPolicy()
    for block in model:
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload_policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload_policy)
    for _ in range(2):
        model(torch.ones(3, 64, device=device)).sum().backward()
    assert seen == {
        (when, f"{i}.{layer}"): 2 for when in ("forward", "backward") for i in (0, 1) for layer in ("nested", "plain")
    }
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        rows = torch.chunk(expected[name].view(parameter.shape[0], -1), dist.get_world_size())
        own = rows[dist.get_rank()] if dist.get_rank() < len(rows) else torch.empty(0, dtype=torch.uint8)
        assert torch.equal(as_bytes(parameter.to_local()), own.reshape(-1)), name
        assert parameter.to_local().device.type == ("cpu" if offload else device)


@pytest.mark.parametrize("param_dtype", [None, torch.float32])
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize(("world_size", "device"), [*groups(2), *groups(3)])
def test_bytes_survive_shard_and_gather(
    ranks: RankPools,
    world_size: int,
    device: str,
    mixed: bool,
    offload: bool,
    reshard: bool,
    param_dtype: torch.dtype | None,
) -> None:
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    ranks.run(world_size, device, check_bytes, device, mixed, offload, reshard, policy)


def check_refused_in_forward(device: str, param_dtype: torch.dtype) -> None:
    model = Block(torch.Generator().manual_seed(0), mixed=False).to(device)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh(device, (dist.get_world_size(),)), mp_policy=policy)
    with pytest.raises(ValueError, match=f"arrived as {param_dtype}.*Use param_dtype=None"):
        model(torch.ones(3, 64, device=device))


@pytest.mark.parametrize("param_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_converted_bytes_are_refused(ranks: RankPools, world_size: int, device: str, param_dtype: torch.dtype) -> None:
    """By the layer itself, if ``fully_shard`` was called directly."""
    ranks.run(world_size, device, check_refused_in_forward, device, param_dtype)


class Packed(nn.Linear):
    """Holds bytes that must not be converted, as NF4Linear does."""

    def check_mixed_precision_policy(self, policy: MixedPrecisionPolicy) -> None:
        if policy.param_dtype is not None:
            raise ValueError(f"{policy.param_dtype} would convert bytes.")


def test_a_module_may_refuse_the_mixed_precision_policy_before_anything_is_sharded() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"packed": Packed(2, 2)}))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^1\.packed: torch\.bfloat16 would convert bytes\.$"):
        FSDP2Strategy(mp_policy=policy).shard(model, [[model[0]]])
    with pytest.raises(ValueError, match=r"^Packed: torch\.bfloat16"):
        FSDP2Strategy(mp_policy=policy).shard(model[1]["packed"], [])
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_a_policy_that_would_convert_4bit_weights_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), NF4Linear(8, 8))
    policy = MixedPrecisionPolicy(param_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^1: MixedPrecisionPolicy\(.*would convert the packed"):
        FSDP2Strategy(mp_policy=policy).shard(model, [[model[1]]])


# ------------------------------------------------------------------------------------------ a Llama, loaded sharded


def check_sharded_load(directory: Path, device: str, offload: bool) -> None:
    checkpoint = SafetensorsCheckpoint(directory)
    root = torch.device(device, dist.get_rank()) if device == "cuda" else torch.device(device)
    parameters_on = torch.device("cpu") if offload else None

    def build(sharded: bool) -> nn.Module:
        model = build_model(checkpoint, default_lora(6))  # r: no multiple of the 4 that 3 ranks would make it
        if sharded:
            offload_policy = CPUOffloadPolicy(pin_memory=device == "cuda") if offload else OffloadPolicy()
            options: dict[str, Any] = {"mesh": init_device_mesh(device, (dist.get_world_size(),))}
            for group in model.shard_groups():
                fully_shard(group, offload_policy=offload_policy, **options)
            fully_shard(model, offload_policy=offload_policy, **options)
        materialize(model, checkpoint, root, seed=3, parameters_on=parameters_on if sharded else None)
        return model

    whole, sharded = build(False), build(True)
    assert any(isinstance(module, NF4Linear) for module in whole.modules())
    for (name, expected), (same_name, parameter) in zip(
        whole.named_parameters(), sharded.named_parameters(), strict=True
    ):
        assert name == same_name
        assert isinstance(parameter, DTensor)
        assert torch.equal(as_bytes(parameter.full_tensor()), as_bytes(expected)), name
    for (name, expected), (_, buffer) in zip(whole.named_buffers(), sharded.named_buffers(), strict=True):
        assert torch.equal(as_bytes(buffer), as_bytes(expected)), name
    ids = torch.arange(3, 43, device=root).view(2, 20)
    torch.testing.assert_close(sharded(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("source", ["16-bit", "16-bit tied", "nested", "plain", "bf16-storage", "partial"])
@pytest.mark.parametrize(("world_size", "device"), [*groups(2), *groups(3)])
def test_every_rank_loads_its_rows(
    ranks: RankPools, tiny_llama_dirs: Any, tiny_llama_4bit_dirs: Any, world_size: int, device: str, source: str,
    offload: bool,
) -> None:  # fmt: skip
    """Each tensor of a model that is sharded before it is loaded equals that of a model loaded whole, LoRA included."""
    if source.startswith("16-bit"):
        directory = tiny_llama_dirs["tied" if "tied" in source else "untied"]
    else:
        directory = tiny_llama_4bit_dirs[source]
    ranks.run(world_size, device, check_sharded_load, directory, device, offload)


# ------------------------------------------------------------------------------------- what a rank holds and gathers


class CountBytes(L.Callback):
    """Of one training step: bytes of 4-bit weights on this rank, and the size of each all-gather before the update."""

    def __init__(self) -> None:
        self.held = 0
        self.gathers: list[int] = []
        self._patch = pytest.MonkeyPatch()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for module in pl_module.modules():
            if isinstance(module, NF4Linear):
                tensors = [t.to_local() for t in module.parameters()] + list(module.buffers())  # type: ignore[attr-defined]
                self.held += sum(t.nbytes for t in tensors)
        # FSDP2 calls the first name in torch 2.13 and the second one before.
        for name in ("all_gather_single", "all_gather_into_tensor"):
            if hasattr(dist, name):
                self._patch.setattr(dist, name, self._counting(getattr(dist, name)))

    def _counting(self, gather: Any) -> Any:
        def counted(output: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.gathers.append(output.nbytes)
            return gather(output, *args, **kwargs)

        return counted

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._patch.undo()


def train_one_step(directory: Path, device: str, lora_r: int) -> tuple[int, list[int]]:
    module, count = QLoRACausalLM(directory, default_lora(lora_r)), CountBytes()
    ids = torch.randint(0, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "num_loss_tokens": 4 * 15}
    fit(module, DataLoader([batch], batch_size=None), device, callbacks=[count], max_steps=1)
    return count.held, count.gathers


def fit(
    module: L.LightningModule,
    data: Any,
    device: str,
    strategy: Strategy | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> L.Trainer:
    """Run a Trainer on this rank of a pool."""
    trainer = L.Trainer(
        accelerator=device,
        devices=dist.get_world_size(),
        strategy=strategy or FSDP2Strategy(precision="32-true"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # Lightning's would shuffle
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_a_rank_holds_half_of_the_4bit_weights_and_gathers_packed_bytes(
    ranks: RankPools, world_size: int, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, lora_r = resolve_model(DEMO_MODEL), 8
    config = load_config(directory)
    hidden, middle, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    shapes += [(middle, hidden), (middle, hidden), (hidden, middle)]
    packed = sum(n * k // 2 + n * k // 64 for n, k in shapes)
    nested = sum(4 * (256 + -(-n * k // 64 // 256) + 1) for n, k in shapes)
    base = config.num_hidden_layers * (packed + nested)
    layer = packed + sum(4 * lora_r * (n + k) for n, k in shapes) + 2 * 4 * hidden
    root = 4 * config.vocab_size * hidden + 4 * hidden  # tied embeddings and the last norm, float32

    for held, gathers in ranks.run(world_size, device, train_one_step, directory, device, lora_r):
        with capsys.disabled():
            print(f"\na rank holds {held / base:.4f} of the 4-bit base; a layer gathers {min(gathers)} bytes ({layer})")
        assert held <= 0.52 * base
        # Each layer once in forward and once in backward, the root once.
        assert len(gathers) == 2 * config.num_hidden_layers + 1
        assert sorted(gathers) == pytest.approx([layer] * (len(gathers) - 1) + [root], rel=0.01)


@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_a_frozen_embedding_and_head_are_gathered_once(
    ranks: RankPools, tiny_llama_dir: Path, world_size: int, device: str
) -> None:
    """Backward begins with the head, which is still there, and ends before the embedding; layers are gathered twice."""
    for _, gathers in ranks.run(world_size, device, train_one_step, tiny_llama_dir, device, 4):
        embedding, head = 4 * 300 * 64, 4 * 300 * 64 + 4 * 64
        layer = gathers[1]
        assert gathers == [embedding, layer, layer, head, layer, layer]
        assert layer not in (embedding, head)


# ---------------------------------------------------------------------------------------- in somebody's own project

SIZE, SAMPLES, GLOBAL_BATCH, EPOCHS, CLIP = 24, 36, 12, 2, 0.2


class Adapted(nn.Module):
    """A frozen 4-bit layer and a trained low-rank one, written by hand; of the 4 rows of ``down`` a third rank has
    none."""

    def __init__(self) -> None:
        super().__init__()
        self.base = NF4Linear.from_linear(nn.Linear(SIZE, SIZE, bias=False))
        self.down, self.up = nn.Linear(SIZE, 4, bias=False), nn.Linear(4, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x)))


def make_net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(Adapted(), Adapted(), nn.Linear(SIZE, 3))


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, SIZE, generator=generator)
    return TensorDataset(x, torch.tanh(2 * x[:, :3]))


class Project(L.LightningModule):
    """A LightningModule that knows nothing of this package but NF4Linear and ``strategy.shard``."""

    def __init__(self, forget_to_shard: bool = False) -> None:
        super().__init__()
        self.forget_to_shard = forget_to_shard
        self.losses: list[float] = []
        self.output_dtype: torch.dtype | None = None

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            with torch.device("cpu"):  # some strategies make the GPU the default, which draws other random numbers
                self.net = make_net()
            if not self.forget_to_shard:
                self.trainer.strategy.shard(self.net, [[self.net[0]], [self.net[1]]])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        output = self.net(x)
        self.output_dtype = output.dtype
        loss = nn.functional.mse_loss(output.float(), y)
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.losses.append(float(self.trainer.callback_metrics["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.2, momentum=0.9)

    def weights(self) -> list[Tensor]:
        """The trained ones, whole."""
        trained = [p.detach() for p in self.parameters() if p.requires_grad]
        return [(p.full_tensor() if isinstance(p, DTensor) else p).cpu().clone() for p in trained]


def one_process_loop(dtype: torch.dtype | None) -> tuple[list[float], list[Tensor]]:
    """The same training without Trainer, strategy or ranks; ``dtype`` is autocast's."""
    net, (x, y) = make_net(), make_data().tensors
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer, losses, clipped = torch.optim.SGD(trained, lr=0.2, momentum=0.9), [], 0
    for start in list(range(0, SAMPLES, GLOBAL_BATCH)) * EPOCHS:
        rows = slice(start, start + GLOBAL_BATCH)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            output = net(x[rows])
        loss = nn.functional.mse_loss(output.float(), y[rows])
        optimizer.zero_grad()
        loss.backward()
        clipped += nn.utils.clip_grad_norm_(trained, CLIP) > CLIP
        optimizer.step()
        losses.append(loss.item())
    assert clipped > 1
    return losses, [p.detach().clone() for p in trained]


def loader() -> DataLoader[Any]:
    data = make_data()
    return DataLoader(data, GLOBAL_BATCH // dist.get_world_size(), sampler=DistributedSampler(data, shuffle=False))


def fit_project(device: str, precision: str, offload: bool) -> tuple[list[float], list[Tensor], torch.dtype | None]:
    module = Project()
    strategy = FSDP2Strategy(precision=precision, cpu_offload=offload)
    fit(module, loader(), device, strategy, max_epochs=EPOCHS, gradient_clip_val=CLIP)
    return module.losses, module.weights(), module.output_dtype


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(("world_size", "device"), [*groups(1), *groups(2)])
def test_a_plain_lightning_project_trains_as_on_one_process(
    ranks: RankPools, world_size: int, device: str, precision: str, offload: bool
) -> None:
    dtype = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}[precision.split("-")[0]]
    losses, weights = one_process_loop(dtype)
    assert losses[-1] < 0.8 * losses[0]
    # In 16 bit, half batches round otherwise than whole ones.
    tolerance = {None: 2e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    if device == "cuda" and dtype is None:
        tolerance = 1e-3  # TF32 may be on
    for found_losses, found_weights, found_dtype in ranks.run(
        world_size, device, fit_project, device, precision, offload
    ):
        assert found_dtype == (dtype or torch.float32)
        assert found_losses == pytest.approx(losses, rel=tolerance)
        for found, expected in zip(found_weights, weights, strict=True):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def fit_with_plugin(device: str, strategy: Any, precision: Any) -> list[float]:
    """A Trainer that is given the strategy and, apart from it, the precision."""
    module = Project() if strategy is FSDP2Strategy else Project(forget_to_shard=True)
    scaler = torch.amp.GradScaler(device) if precision == "16-mixed" else None
    plugins = [MixedPrecision(precision, device, scaler)]
    fit(module, loader(), device, strategy(), max_epochs=EPOCHS, gradient_clip_val=CLIP, plugins=plugins)
    return module.losses


@pytest.mark.parametrize("strategy", [FSDP2Strategy, ReplicatedStrategy])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_a_plain_lightning_project_may_bring_its_precision_plugin(
    ranks: RankPools, world_size: int, device: str, precision: str, strategy: Any
) -> None:
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    losses, _ = one_process_loop(dtype)
    for found in ranks.run(world_size, device, fit_with_plugin, device, strategy, precision):
        assert found == pytest.approx(losses, rel=5e-2 if precision == "bf16-mixed" else 5e-3)


# ------------------------------------------------------------------------------------------- what travels, and when


class Traffic:
    """Counts collectives by kind while it is entered, by FSDP2's names for them in torch 2.13 and before."""

    def __init__(self) -> None:
        self.gathers = self.reductions = 0
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Traffic":
        for kind, names in (
            ("gathers", ("all_gather_single", "all_gather_into_tensor")),
            ("reductions", ("reduce_scatter_single", "reduce_scatter_tensor")),
        ):
            for name in names:
                if hasattr(dist, name):
                    self._patch.setattr(dist, name, self._counting(kind, getattr(dist, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _counting(self, kind: str, collective: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            setattr(self, kind, getattr(self, kind) + 1)
            return collective(*args, **kwargs)

        return counted


def fit_accumulating(device: str, reduce_every: bool, offload: bool) -> tuple[int, list[float], list[Tensor]]:
    module = Project()
    strategy = FSDP2Strategy(precision="32-true", cpu_offload=offload, reduce_every_micro_batch=reduce_every)
    with Traffic() as traffic:
        fit(module, loader(), device, strategy, max_epochs=EPOCHS, accumulate_grad_batches=2)
    return traffic.reductions, module.losses, module.weights()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_accumulation_reduces_once_a_step(ranks: RankPools, world_size: int, device: str, offload: bool) -> None:
    """Three batches make a step of two and one of one; three groups are reduced."""
    lazy = ranks.run(world_size, device, fit_accumulating, device, False, offload)
    eager = ranks.run(world_size, device, fit_accumulating, device, True, offload)
    for (reductions, losses, weights), (all_reductions, same_losses, same_weights) in zip(lazy, eager, strict=True):
        assert (reductions, all_reductions) == (EPOCHS * 2 * 3, EPOCHS * 3 * 3)
        assert losses == pytest.approx(same_losses, rel=1e-5)
        for found, expected in zip(weights, same_weights, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class Deep(Project):
    """Four blocks that note how many groups have been gathered when each begins its forward and its backward."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic
        self.gathered: list[tuple[str, int, int]] = []

    def configure_model(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(*[Adapted() for _ in range(4)], nn.Linear(SIZE, 3))
        self.trainer.strategy.shard(self.net, [[block] for block in self.net[:4]])
        for i in range(4):
            self.net[i].down.register_forward_hook(lambda *args, i=i: self.note(i, args[2]))

    def note(self, i: int, output: Tensor) -> None:
        self.gathered.append(("forward", i, self.traffic.gathers))
        if output.requires_grad:
            # On a tensor inside the block: its gradient comes after the block's weights have been asked for.
            output.register_hook(lambda _: self.gathered.append(("backward", i, self.traffic.gathers)))


def fit_prefetching(device: str, prefetch: int, reshard: bool = True) -> tuple[list[tuple[str, int, int]], list[float]]:
    with Traffic() as traffic:
        module = Deep(traffic)
        strategy = FSDP2Strategy(precision="32-true", prefetch=prefetch, reshard_after_forward=reshard)
        fit(module, loader(), device, strategy, max_steps=1)
    return module.gathered, module.losses


@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_prefetch_gathers_ahead(ranks: RankPools, world_size: int, device: str) -> None:
    """The root is gathered first and stays, so that forward makes five gathers and backward four."""
    ((as_fsdp2_does, losses), _) = ranks.run(world_size, device, fit_prefetching, device, 0)
    assert as_fsdp2_does[:4] == [("forward", i, 2 + i) for i in range(4)]
    for ahead in (1, 2):
        for gathered, same_losses in ranks.run(world_size, device, fit_prefetching, device, ahead):
            assert gathered[:4] == [("forward", i, min(5, 2 + i + ahead)) for i in range(4)]
            assert gathered[4:] == [("backward", i, 5 + min(4, 4 - i + ahead)) for i in (3, 2, 1, 0)]
            assert same_losses == losses
    for kept, same_losses in ranks.run(world_size, device, fit_prefetching, device, 0, False):
        assert [gathers for when, _, gathers in kept if when == "backward"] == [5] * 4
        assert same_losses == losses


def fit_hybrid(device: str, checkpoint: Path | None, resume: Path | None) -> tuple[list[float], list[Tensor]]:
    module = Project()
    strategy = FSDP2Strategy(precision="32-true", shard_size=2)
    epochs = EPOCHS if checkpoint is None else 1
    trainer = fit(module, loader(), device, strategy, ckpt_path=resume, max_epochs=epochs, gradient_clip_val=CLIP)
    for parameter in module.parameters():
        assert isinstance(parameter, DTensor)
        assert [placement.is_shard() for placement in parameter.placements] == [False, True]
        assert parameter.device_mesh.shape == (2, 2)
        assert parameter.to_local().shape[0] <= -(-parameter.shape[0] // 2)
    if checkpoint is not None:
        trainer.save_checkpoint(checkpoint)
    return module.losses, module.weights()


@pytest.mark.parametrize(("world_size", "device"), groups(4))
def test_hybrid_sharding_trains_as_one_process(ranks: RankPools, tmp_path: Path, world_size: int, device: str) -> None:
    """Two copies of the model, each in two shards; checkpoints go to two ranks and come from them."""
    losses, weights = one_process_loop(None)
    steps = SAMPLES // GLOBAL_BATCH
    of_four, of_two = tmp_path / "four.ckpt", tmp_path / "two.ckpt"
    results = ranks.run(world_size, device, fit_hybrid, device, of_four, None)
    assert all(found == pytest.approx(losses[:steps], rel=2e-5) for found, _ in results)
    results = ranks.run(2, device, fit_second_epoch, device, of_four)
    ranks.run(2, device, fit_first_epoch, device, of_two)
    results += ranks.run(world_size, device, fit_hybrid, device, None, of_two)
    for found_losses, found_weights in results:
        assert found_losses == pytest.approx(losses[steps:], rel=2e-5)
        for found, expected in zip(found_weights, weights, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def fit_indivisible(device: str) -> None:
    with pytest.raises(ValueError, match=r"shard_size=3 does not divide the 2 ranks \(1 nodes of 2\)"):
        fit(Project(), loader(), device, FSDP2Strategy(shard_size=3), max_epochs=1)


def test_sizes_that_make_no_sense_are_refused(ranks: RankPools) -> None:
    with pytest.raises(ValueError, match="shard_size must be at least 2, got 1"):
        FSDP2Strategy(shard_size=1)
    with pytest.raises(ValueError, match="prefetch must not be negative, got -1"):
        FSDP2Strategy(prefetch=-1)
    ranks.run(2, "cpu", fit_indivisible, "cpu")


# ---------------------------------------------------------------------------------------------------- checkpoints


def fit_first_epoch(device: str, checkpoint: Path, sharded: bool = False) -> None:
    strategy = FSDP2Strategy(precision="32-true", sharded_checkpoints=sharded)
    trainer = fit(Project(), loader(), device, strategy, max_epochs=1, gradient_clip_val=CLIP)
    trainer.save_checkpoint(checkpoint)


def fit_second_epoch(device: str, checkpoint: Path) -> tuple[list[float], list[Tensor]]:
    module = Project()
    fit(module, loader(), device, ckpt_path=checkpoint, max_epochs=EPOCHS, gradient_clip_val=CLIP)
    return module.losses, module.weights()


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "sharded"])
@pytest.mark.parametrize(("saving", "loading"), [(2, 3), (3, 2), (2, 1), (1, 2)])
def test_a_checkpoint_continues_on_another_number_of_ranks(
    ranks: RankPools, tmp_path: Path, saving: int, loading: int, sharded: bool
) -> None:
    """Momentum included; and the file holds nothing of the frozen layers."""
    path = tmp_path / "one.ckpt"
    ranks.run(saving, "cpu", fit_first_epoch, "cpu", path, sharded)
    assert path.is_dir() == sharded
    if not sharded:
        assert set(read_checkpoint(path)["state_dict"]) == {
            f"net.{name}" for name, parameter in make_net().named_parameters() if parameter.requires_grad
        }
    losses, weights = one_process_loop(None)
    for found_losses, found_weights in ranks.run(loading, "cpu", fit_second_epoch, "cpu", path):
        assert found_losses == pytest.approx(losses[SAMPLES // GLOBAL_BATCH :], rel=2e-5)
        for found, expected in zip(found_weights, weights, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def fit_without_shard(device: str) -> None:
    with pytest.raises(
        RuntimeError, match=r"'net\.0\.down\.weight' is trained but not sharded over the 2 ranks.*shard\("
    ):
        fit(Project(forget_to_shard=True), loader(), device, max_epochs=1)


def test_forgetting_to_shard_is_an_error(ranks: RankPools) -> None:
    ranks.run(2, "cpu", fit_without_shard, "cpu")


class Overflowing(Project):
    """The second batch's loss is infinite on the last rank alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scales: list[float] = []
        self.history: list[list[Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = 0.01 * super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 1 and self.global_rank == self.trainer.world_size - 1 else loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())
        self.history.append(self.weights())


def fit_overflowing(device: str) -> tuple[list[float], list[list[Tensor]]]:
    module = Overflowing()
    fit(module, loader(), device, FSDP2Strategy(precision="16-mixed"), max_epochs=1)
    return module.scales, module.history


@pytest.mark.parametrize(("world_size", "device"), groups(2))
def test_an_overflow_on_one_rank_makes_all_skip_the_step(ranks: RankPools, world_size: int, device: str) -> None:
    results = ranks.run(world_size, device, fit_overflowing, device)
    for scales, (first, second, third) in results:
        assert scales[1] == scales[2] == scales[0] / 2
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(second, third, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(third, results[0][1][2], strict=True))
        assert all(bool(weight.isfinite().all()) for weight in third)
