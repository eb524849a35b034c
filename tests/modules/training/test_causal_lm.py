"""The LightningModule on one device: the gradient of a step, what a checkpoint holds, and what is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_qlora.modules.checkpoints.safetensors_files import SafetensorsCheckpoint
from lightning_qlora.modules.distributed.fsdp2 import FSDP2Strategy
from lightning_qlora.modules.lora.adapter_files import load_adapter, read_adapter, save_adapter
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.models.build import build_model, materialize
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.quantization.nf4_linear import NF4Linear
from lightning_qlora.modules.training.causal_lm import QLoRACausalLM
from tests.training import qlora

STRATEGIES: dict[str, Callable[[], Strategy | str]] = {"auto": lambda: "auto", "fsdp2": FSDP2Strategy}


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
]


@pytest.fixture(params=STRATEGIES)
def strategy(request, no_group_left) -> Callable[[], Strategy | str]:
    """Makes a strategy."""
    return STRATEGIES[request.param]


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """``trainer(strategy, max_steps=..., ...)``: a silent CPU trainer."""

    def make(strategy: Strategy | str = "auto", **options: Any) -> L.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_steps": 1,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path,
            "inference_mode": False, "use_distributed_sampler": False,
        }  # fmt: skip
        return L.Trainer(strategy=strategy, **{**defaults, **options})

    return make


def batch(lengths: list[int], seed: int, ignored: bool = False) -> dict[str, Any]:
    """Samples of ``lengths`` tokens, right-padded; the first two tokens of each are the prompt, or all are ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 300, (length,), generator=generator)
        if not ignored:
            labels[row, 2:length] = ids[row, 2:length]
    return {"input_ids": ids, "labels": labels, "num_loss_tokens": int((labels[:, 1:] != -100).sum())}


def join(*batches: dict[str, Any]) -> dict[str, Any]:
    """One batch of all the samples."""
    longest = max(b["input_ids"].shape[1] for b in batches)

    def padded(name: str, value: int) -> Tensor:
        rows = [nn.functional.pad(b[name], (0, longest - b[name].shape[1]), value=value) for b in batches]
        return torch.cat(rows)

    tokens = sum(b["num_loss_tokens"] for b in batches)
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "num_loss_tokens": tokens}


def loader(*batches: dict[str, Any]) -> DataLoader[Any]:
    return DataLoader(list(batches), batch_size=None)


class Record(Callback):
    """Losses, learning rates and gradients of every optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.norms: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def keep(*_: Any) -> None:
            self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

        trainer.optimizers[0].register_step_post_hook(keep)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == len(self.losses) + 1:
            metrics = trainer.callback_metrics
            self.losses.append(float(metrics["train_loss"]))
            self.rates.append(float(metrics["lr"]))
            self.norms.append(float(metrics["grad_norm"]))


@pytest.fixture(scope="module")
def adapter(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of ``default_lora(4)``: from it, both of its matrices get gradients at once."""
    checkpoint = SafetensorsCheckpoint(tiny_llama_dir)
    model = build_model(checkpoint, default_lora(4))
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(model, directory, default_lora(4), "base")
    return directory


# --- a step


def dense_mean_loss(directory: Path, adapter: Path, data: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the mean over all tokens, straight from autograd, without trainer or micro-batches."""
    checkpoint = SafetensorsCheckpoint(directory)
    model = build_model(checkpoint, default_lora(4))
    materialize(model, checkpoint, torch.device("cpu"), seed=0)
    load_adapter(model, adapter, default_lora(4))
    logits = model(data["input_ids"]).logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, data["labels"][:, 1:].flatten())
    loss.backward()
    return float(loss.detach()), {f"model.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}


UNEQUAL = (batch([5, 4], 1), batch([40, 31, 7], 2))
WITH_BLANK = (batch([9, 4], 3), batch([6], 4, ignored=True))


@pytest.mark.parametrize(
    "micro_batches", [UNEQUAL, WITH_BLANK, WITH_BLANK[::-1]], ids=["unequal", "blank", "blank 1st"]
)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_accumulated_micro_batches_are_one_big_batch(strategy, trainer, tiny_llama_dir, adapter, micro_batches, clip):
    loss, gradients = dense_mean_loss(tiny_llama_dir, adapter, join(*micro_batches))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    factor = 1.0 if clip is None else clip / (norm + 1e-6)
    assert factor <= 1
    for batches in (micro_batches, (join(*micro_batches),)):
        record = Record()
        module = QLoRACausalLM(tiny_llama_dir, default_lora(4), init_adapter=adapter)
        trainer(strategy(), accumulate_grad_batches=len(batches), callbacks=[record], gradient_clip_val=clip).fit(
            module, loader(*batches)
        )
        assert record.losses == [pytest.approx(loss, rel=1e-6)]
        assert record.norms == [pytest.approx(norm, rel=1e-5)]
        assert record.gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(record.gradients[name], gradient * factor, rtol=1e-5, atol=1e-6)


def test_callbacks_see_the_mean_loss_of_each_micro_batch(trainer, tiny_llama_dir, adapter):
    """As ``Tuner.lr_find`` and others read it; Lightning divides it by the accumulation."""
    seen: list[float] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            seen.append(float(outputs["loss"]))

    module = QLoRACausalLM(tiny_llama_dir, default_lora(4), init_adapter=adapter)
    trainer(accumulate_grad_batches=2, callbacks=[Look()]).fit(module, loader(*UNEQUAL))
    expected = [dense_mean_loss(tiny_llama_dir, adapter, each)[0] / 2 for each in UNEQUAL]
    assert seen == pytest.approx(expected, rel=1e-6)


def test_a_training_step_of_ones_own_gets_its_own_gradients(trainer, tiny_llama_dir, adapter):
    class Own(QLoRACausalLM):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            loss, tokens = self.loss_sum(batch)
            self.log("train_loss", 3 * loss.detach() / tokens)
            return 3 * loss / tokens

    record = Record()
    module = Own(tiny_llama_dir, default_lora(4), init_adapter=adapter)
    trainer(callbacks=[record]).fit(module, loader(UNEQUAL[1]))
    loss, gradients = dense_mean_loss(tiny_llama_dir, adapter, UNEQUAL[1])
    assert record.losses == [pytest.approx(3 * loss, rel=1e-6)]
    for name, gradient in gradients.items():
        torch.testing.assert_close(record.gradients[name], 3 * gradient, rtol=1e-5, atol=1e-6)


def test_a_finished_run_that_goes_on_follows_the_longer_schedule(trainer, tmp_path, tiny_llama_dir):
    def train(steps: int, *, done: int = 0) -> list[float]:
        record = Record()
        record.losses += [0.0] * done  # it waits for the step after those
        module = QLoRACausalLM(tiny_llama_dir, default_lora(4), learning_rate=1e-3, schedule="linear")
        fit = trainer(max_steps=steps, callbacks=[record])
        resumed = {"ckpt_path": tmp_path / f"{done}.ckpt", "weights_only": False} if done else {}
        fit.fit(module, loader(*[UNEQUAL[0]] * 4), **resumed)
        fit.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return record.rates

    assert train(2) == pytest.approx([1e-3, 5e-4])
    assert train(4, done=2) == pytest.approx([5e-4, 2.5e-4])


def test_micro_batches_of_a_step_that_was_interrupted_count_in_no_other(trainer, tiny_llama_dir, adapter):
    class Stop(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            raise KeyError("in the middle of a step")

        on_validation_batch_end = on_train_batch_end

    def train(module: QLoRACausalLM) -> tuple[Record, float]:
        record = Record()
        fit = trainer(accumulate_grad_batches=2, callbacks=[record], check_val_every_n_epoch=1)
        fit.fit(module, loader(*UNEQUAL), loader(UNEQUAL[0]))
        return record, float(fit.callback_metrics["val_loss"])

    fresh, used = (QLoRACausalLM(tiny_llama_dir, default_lora(4), init_adapter=adapter) for _ in range(2))
    with pytest.raises(KeyError, match="middle"):
        trainer(accumulate_grad_batches=2, callbacks=[Stop()]).fit(used, loader(*UNEQUAL[::-1]))
    with pytest.raises(KeyError, match="middle"):
        trainer(callbacks=[Stop()]).validate(used, loader(*UNEQUAL[::-1]))
    assert used._pending
    assert used._val
    (first, val_loss), (second, other_val_loss) = train(fresh), train(used)
    assert second.losses == first.losses
    assert second.norms == first.norms
    assert other_val_loss == val_loss


def pack(documents: list[dict[str, Any]], rows: list[list[int]]) -> dict[str, Any]:
    """Rows of the documents (of one sample each) with these numbers."""

    def joined(name: str) -> Tensor:
        return torch.stack([torch.cat([documents[i][name][0] for i in row]) for row in rows])

    lengths = [[documents[i]["input_ids"].shape[1] for i in row] for row in rows]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    tokens = sum(document["num_loss_tokens"] for document in documents)
    return {
        "input_ids": joined("input_ids"), "labels": joined("labels"), "position_ids": positions,
        "document_lengths": lengths, "num_loss_tokens": tokens,
    }  # fmt: skip


def test_a_step_on_packed_rows_is_one_on_their_documents(strategy, trainer, tiny_llama_dir, adapter):
    documents = [batch([length], length) for length in (6, 3, 5, 4)]
    loss, gradients = dense_mean_loss(tiny_llama_dir, adapter, join(*documents))
    record = Record()
    module = QLoRACausalLM(tiny_llama_dir, default_lora(4), init_adapter=adapter, packing=True)
    trainer(strategy(), callbacks=[record]).fit(module, loader(pack(documents, [[0, 1], [2, 3]])))
    assert record.losses == [pytest.approx(loss, rel=1e-6)]
    for name, gradient in gradients.items():
        torch.testing.assert_close(record.gradients[name], gradient, rtol=1e-5, atol=1e-6)


def test_a_step_without_any_token_is_a_step_of_zero_loss(trainer, tiny_llama_dir, adapter):
    record = Record()
    module = QLoRACausalLM(tiny_llama_dir, default_lora(4), init_adapter=adapter)
    trainer(callbacks=[record]).fit(module, loader(batch([6], 4, ignored=True)))
    assert record.losses == [0.0]
    assert all(not gradient.any() for gradient in record.gradients.values())


def test_gradients_are_gone_when_the_next_step_computes_its_loss(strategy, trainer, tiny_llama_dir):
    there: list[int] = []

    class Watch(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trained = [p for p in pl_module.parameters() if p.requires_grad]
            pl_module.model.lm_head.register_forward_hook(
                lambda *_: there.append(sum(p.grad is not None for p in trained))
            )

    module = QLoRACausalLM(tiny_llama_dir, default_lora(4))
    data = [batch([6, 4], seed) for seed in range(4)]
    trainer(strategy(), max_steps=2, accumulate_grad_batches=2, callbacks=[Watch()]).fit(module, loader(*data))
    assert there == [0, 2 * 2 * 7, 0, 2 * 2 * 7]


def test_attention_is_chosen_by_device_precision_and_data_and_said(monkeypatch, trainer, tiny_llama_dir):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    said: list[str] = []
    monkeypatch.setattr("lightning_qlora.modules.training.base.rank_zero_info", said.append)
    gpu = torch.device("cuda", 0)
    assert QLoRACausalLM(tiny_llama_dir)._attention(gpu, torch.float16).name == "sdpa_repeated_kv"
    assert "Keys and values are repeated" in said.pop()
    with pytest.raises(ValueError, match="attention='flash' needs compute capability"):
        QLoRACausalLM(tiny_llama_dir, compute=ComputeOptions(attention="flash"))._attention(gpu, torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert QLoRACausalLM(tiny_llama_dir)._attention(gpu, torch.float16).name == "sdpa"
    assert QLoRACausalLM(tiny_llama_dir, packing=True)._attention(gpu, torch.float16).name == "flash"
    assert "packed rows" in said.pop()
    said.clear()
    windowed = QLoRACausalLM(tiny_llama_dir, compute=ComputeOptions(sliding_window=3))
    trainer().fit(windowed, loader(batch([6], 1)))
    assert (windowed.model.attention_backend.name, windowed.model.config.attention_window) == ("sdpa", 3)
    assert len(said) == 1
    assert said[0].endswith("documents of about equal length together, and windows in chunks.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "fast"}, "attention must be one of 'auto', 'sdpa', 'flex', 'flash', 'xformers', 'eager'"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
    ],
)
def test_attention_that_does_not_exist_is_refused_at_once(tiny_llama_dir, options, message):
    with pytest.raises(ValueError, match=message):
        qlora(tiny_llama_dir, **options)


def test_validation_is_the_mean_over_all_tokens(strategy, trainer, tiny_llama_dir, adapter):
    module = QLoRACausalLM(tiny_llama_dir, default_lora(4), init_adapter=adapter)
    expected, _ = dense_mean_loss(tiny_llama_dir, adapter, join(*UNEQUAL))
    (metrics,) = trainer(strategy()).validate(module, loader(*UNEQUAL), verbose=False)
    assert metrics["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_training_learns_and_leaves_the_base_alone(strategy, trainer, tiny_llama_4bit_dir):
    module = QLoRACausalLM(tiny_llama_4bit_dir, default_lora(8), learning_rate=2e-2, schedule="constant")
    record, data = Record(), batch([20, 18], 5)
    reference = build_model(module.base, default_lora(8))
    materialize(reference, module.base, torch.device("cpu"), seed=0)
    trainer(strategy(), max_steps=15, max_epochs=-1, callbacks=[record]).fit(module, loader(data))
    assert record.losses[-1] < 0.5 * record.losses[0]
    trained = dict(module.model.named_parameters())
    changed = {name for name, p in reference.named_parameters() if not same_bytes(p, trained[name])}
    assert changed == {name for name in trained if "lora_" in name}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8))


def test_bf16_mixed_keeps_adapters_in_float32(strategy, trainer, tiny_llama_dir):
    made = strategy()
    options = {"precision": "bf16-mixed"} if made == "auto" else {}
    made = made if made == "auto" else FSDP2Strategy(precision="bf16-mixed")
    module = QLoRACausalLM(tiny_llama_dir, default_lora(4))
    record = Record()
    trainer(made, callbacks=[record], **options).fit(module, loader(batch([20, 18], 5)))
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert module.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert math.isfinite(record.losses[0])
    assert all(gradient.dtype == torch.float32 for gradient in record.gradients.values())


# --- the schedule


def test_bf16_true_converts_the_adapters_but_nothing_that_only_stores_bytes(strategy, trainer, tiny_llama_dir):
    made = "auto" if strategy() == "auto" else FSDP2Strategy(precision="bf16-true")
    options = {"precision": "bf16-true"} if made == "auto" else {}
    module = QLoRACausalLM(tiny_llama_dir, default_lora(4), learning_rate=1e-2)
    trainer(made, max_steps=3, **options).fit(module, loader(*[batch([9, 7], seed=0)] * 3))
    assert module.model is not None
    adapters = [p for n, p in module.named_parameters() if "lora_" in n]
    assert {p.dtype for p in adapters} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in adapters)
    assert module.model.model.rotary_emb.inv_freq.dtype == torch.float32
    checkpoint = SafetensorsCheckpoint(tiny_llama_dir)
    plain = build_model(checkpoint, default_lora(4))
    materialize(plain, checkpoint, torch.device("cpu"), seed=0)
    layers = {name: layer for name, layer in plain.named_modules() if isinstance(layer, NF4Linear)}
    for name, layer in layers.items():
        for key, tensor in module.model.get_submodule(name).state_dict().items():
            assert same_bytes(tensor, layer.state_dict()[key]), f"{name}.{key}"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2]),
    ],
)
def test_the_learning_rate_of_each_step(trainer, tiny_llama_dir, schedule, expected):
    module = QLoRACausalLM(tiny_llama_dir, default_lora(1), learning_rate=0.5, warmup_steps=2, schedule=schedule)
    record = Record()
    trainer(max_steps=6, callbacks=[record]).fit(module, loader(*[batch([4], seed) for seed in range(6)]))
    assert record.rates == pytest.approx([0.5 * share for share in expected])


# --- checkpoints


def train(
    trainer: Callable[..., L.Trainer], strategy: Strategy | str, directory: Path, *, resume: Path | None = None,
    save: Path | None = None, steps: int = 4, lora: LoraConfig | None = None, **options: Any,
) -> Record:  # fmt: skip
    """Train ``steps`` steps, each of the same two micro-batches within one epoch, and write ``save`` afterwards."""
    module = qlora(directory, lora or default_lora(4, dropout=0.3), schedule="constant", learning_rate=1e-2, **options)
    record = Record()
    record.losses = [math.nan] * (0 if resume is None else 2)
    fitted = trainer(strategy, max_steps=steps, max_epochs=-1, accumulate_grad_batches=2, callbacks=[record])
    fitted.fit(module, loader(*[batch([12, 9], 6), batch([7], 7)] * 5), ckpt_path=resume, weights_only=False)
    if save is not None:
        fitted.save_checkpoint(save)
    return record


def test_a_resumed_run_repeats_the_uninterrupted_one_exactly_dropout_included(
    strategy, trainer, tiny_llama_dir, tmp_path
):
    whole = train(trainer, strategy(), tiny_llama_dir, steps=4)
    train(trainer, strategy(), tiny_llama_dir, steps=2, save=tmp_path / "step=2.ckpt")
    torch.manual_seed(123)  # what was drawn before must not matter
    resumed = train(trainer, strategy(), tiny_llama_dir, steps=4, resume=tmp_path / "step=2.ckpt")
    assert resumed.losses[2:] == whole.losses[2:]
    assert len(set(whole.losses)) == 4
    other = train(trainer, strategy(), tiny_llama_dir, steps=4, seed=1)
    assert other.losses != whole.losses


def test_a_checkpoint_holds_the_adapters_and_their_optimizer(strategy, trainer, tiny_llama_dir, tmp_path):
    path = tmp_path / "step=2.ckpt"
    train(trainer, strategy(), tiny_llama_dir, steps=2, save=path)
    checkpoint = torch.load(path, weights_only=True)
    assert len(checkpoint["state_dict"]) == 2 * 2 * 7
    assert all("lora_" in name for name in checkpoint["state_dict"])
    (optimizer,) = checkpoint["optimizer_states"]
    assert len(optimizer["state"]) == len(checkpoint["state_dict"])
    trained = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    assert path.stat().st_size < 3 * 4 * trained + 100_000


@pytest.mark.parametrize(
    ("name", "lora", "message"),
    [
        ("other", default_lora(4), "another model or LoRA shape: fingerprint is"),
        ("untied", default_lora(4, alpha=5), "lora_alpha is 8.0 there and 5.0 here"),
        ("untied", default_lora(2), "lora_r is 4 there and 2 here"),
        ("untied", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]), "lora_targets is"),
    ],
)
def test_the_checkpoint_of_something_else_is_refused_before_and_by_the_trainer(
    strategy, trainer, tiny_llama_dirs, tmp_path, name, lora, message
):
    path = tmp_path / "step=2.ckpt"
    train(trainer, strategy(), tiny_llama_dirs["untied"], steps=2, save=path)
    QLoRACausalLM(tiny_llama_dirs["untied"], default_lora(4)).check_checkpoint(path)
    with pytest.raises(ValueError, match=message) as error:
        QLoRACausalLM(tiny_llama_dirs[name], lora).check_checkpoint(path)
    assert str(path) in str(error.value)
    # The strategy itself already refuses tensors that do not fit.
    with pytest.raises(ValueError, match=f"{message}|It was made for another model or LoRA configuration"):
        train(trainer, strategy(), tiny_llama_dirs[name], resume=path, lora=lora)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "There is no checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "is damaged or incomplete.*There is no other"),
        (lambda path: path.write_bytes(b""), "is damaged or incomplete"),
        (lambda path: torch.save({"weights": 1}, path), "is no training checkpoint"),
        (lambda path: torch.save([1], path), "is no training checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_a_model_is_built(trainer, tiny_llama_dir, tmp_path, change, message):
    path = tmp_path / "step=1.ckpt"
    train(trainer, "auto", tiny_llama_dir, steps=1, save=path)
    change(path)
    module = QLoRACausalLM(tiny_llama_dir, default_lora(4))
    module.check_checkpoint(None)
    with pytest.raises(ValueError, match=message):
        module.check_checkpoint(path)
    assert module.model is None


def test_a_checkpoint_that_lacks_an_adapter_is_refused(strategy, trainer, tiny_llama_dir, tmp_path):
    path = tmp_path / "step=2.ckpt"
    train(trainer, strategy(), tiny_llama_dir, steps=2, save=path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"].popitem()
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"lacks parameter 'model.*lora_"):
        train(trainer, strategy(), tiny_llama_dir, resume=path)


# --- in and out


def test_the_adapter_that_a_run_began_with_is_the_one_it_saves(trainer, tiny_llama_dir, adapter, tmp_path):
    module = QLoRACausalLM(
        tiny_llama_dir, default_lora(4), init_adapter=adapter, learning_rate=1e-30, model_name="my/base"
    )
    trainer().fit(module, loader(batch([6], 1)))
    module.save_adapter(tmp_path / "adapter")
    theirs, ours = (read_adapter(d, default_lora(4)) for d in (adapter, tmp_path / "adapter"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert LoraConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == "my/base"


def test_answers_are_greedy_and_leave_training_mode_on(trainer, tiny_llama_dir, adapter):
    class Ask(Callback):
        answers: tuple[str, ...] = ()

        def on_train_start(self, trainer: L.Trainer, pl_module: QLoRACausalLM) -> None:
            self.answers = tuple(pl_module.answer("what is a thing?", 8) for _ in range(2))
            assert pl_module.model.training

    ask = Ask()
    module = QLoRACausalLM(tiny_llama_dir, default_lora(4, dropout=0.5), init_adapter=adapter)
    trainer(callbacks=[ask]).fit(module, loader(batch([6], 1)))
    first, second = ask.answers
    assert first == second


def test_forward_gives_logits_of_a_4_bit_model_once_it_exists(trainer, tiny_llama_dir):
    module = QLoRACausalLM(tiny_llama_dir, default_lora(4))
    ids = batch([6], 1)["input_ids"]
    with pytest.raises(RuntimeError, match=r"does not exist before configure_model\(\)"):
        module(ids)
    trainer().fit(module, loader(batch([6], 1)))
    assert module(ids).shape == (1, 6, 300)
    built = module.model
    module.configure_model()
    assert module.model is built
    assert sum(isinstance(m, NF4Linear) for m in module.modules()) == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": math.nan}, "learning_rate must be a positive finite number, got nan"),
        ({"learning_rate": math.inf}, "learning_rate must be a positive finite number, got inf"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive finite number, got 0"),
        ({"learning_rate": -1e-4}, "learning_rate must be a positive finite number"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"schedule": "step"}, "schedule must be 'cosine', 'linear' or 'constant', got 'step'"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, got -0.1"),
        ({"weight_decay": math.nan}, "weight_decay must be a finite number of at least 0, got nan"),
        ({"lora": LoraConfig(r=4, use_dora=True)}, "use_dora=True"),
        ({"init_adapter": "no-such-adapter"}, "no-such-adapter holds no LoRA adapter"),
        ({"model_dir": "no-such-model"}, "no-such-model has no config.json"),
    ],
)
def test_bad_settings_are_refused_at_once(tiny_llama_dir, options, message):
    with pytest.raises(ValueError, match=message):
        qlora(**{"model_dir": tiny_llama_dir, "lora": default_lora(4), **options})


def test_an_adapter_of_another_rank_is_refused_at_once(tiny_llama_dir, adapter):
    with pytest.raises(ValueError, match="has r=4, this run r=8"):
        QLoRACausalLM(tiny_llama_dir, default_lora(8), init_adapter=adapter)
