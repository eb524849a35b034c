"""The preference module: packing, ranks, resuming, compilation, and a reference that is the base with adapters off."""

import functools
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_qlora.modules.checkpoints.tokenizer import load_tokenizer
from lightning_qlora.modules.data.preference import PreferenceDataModule
from lightning_qlora.modules.lora.config import default_lora
from lightning_qlora.modules.losses.preference import PreferenceObjective, dpo, ipo, kto, orpo, simpo
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.training.preference import QLoRAPreference
from tests.distributed import RankPools, build
from tests.graphs import Graphs

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

OBJECTIVES = {
    "dpo": PreferenceObjective(functools.partial(dpo, beta=0.5)),
    "ipo": PreferenceObjective(functools.partial(ipo, beta=0.5)),
    "orpo": PreferenceObjective(functools.partial(orpo, beta=0.5), needs_reference=False),
    "simpo": PreferenceObjective(simpo, needs_reference=False),
    "kto": PreferenceObjective(functools.partial(kto, beta=0.5), paired=False),
}

FIGURES = (
    "loss", "rewards_chosen", "rewards_rejected", "margin", "accuracy", "log_probs_chosen", "log_probs_rejected", "kl",
)  # fmt: skip


class Logged(Callback):
    """What is logged at each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == len(self.steps) + 1:
            self.steps.append(figures_of(trainer, "train"))


def figures_of(trainer: L.Trainer, phase: str) -> dict[str, float]:
    metrics = trainer.callback_metrics
    return {name: float(metrics[f"{phase}_{name}"]) for name in FIGURES if f"{phase}_{name}" in metrics}


def write_pairs(path: Path, count: int = 33) -> str:
    """Answers of 1 to 10 words; 3 of the 33 are held out, so that one of two ranks has fewer."""
    rows = [
        {"prompt": f"q {i} " + "x" * (i % 5), "chosen": "a" + " b" * (i % 10), "rejected": "c" + " d" * (i * 7 % 9)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


def run(
    model_dir: Path, dataset: str, loss: str, *, packing: bool = False, strategy: Any = "auto", batch_size: int = 10,
    max_steps: int = 3, accumulate: int = 1, ckpt: Path | None = None, save: Path | None = None,
    reference_file: Path | None = None, accelerator: str = "cpu", devices: int = 1,
    compute: ComputeOptions | None = None, lora: Any = None, callbacks: Any = (), **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train, and return what is logged and the module."""
    objective = OBJECTIVES[loss]
    data = PreferenceDataModule(
        load_tokenizer(model_dir), dataset, batch_size=batch_size, seq_len=64, packing=packing, vocab_size=300,
        paired=objective.paired,
    )  # fmt: skip
    module = QLoRAPreference(
        model_dir, lora or default_lora(4), objective=objective, reference_file=reference_file, packing=packing,
        learning_rate=5e-3, schedule="constant", compute=compute or ComputeOptions(), **options,
    )  # fmt: skip
    logged = Logged()
    trainer = L.Trainer(
        accelerator=accelerator, devices=devices, strategy=strategy, max_steps=max_steps,
        accumulate_grad_batches=accumulate, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, inference_mode=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        callbacks=[logged, *callbacks], gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt)
    if max_steps == 3 and ckpt is None:
        trainer.validate(module, data, verbose=False)
    if save is not None:
        trainer.save_checkpoint(save)
    return {
        "steps": logged.steps, "val": figures_of(trainer, "val"), "module": module if strategy == "auto" else None,
        "data": data if strategy == "auto" else None,
    }  # fmt: skip


def on_ranks(model_dir: Path, dataset: str, loss: str, strategy: str, accelerator: str, options: dict[str, Any]) -> Any:
    devices = torch.distributed.get_world_size()
    return run(
        model_dir, dataset, loss, strategy=build(strategy, devices=devices), accelerator=accelerator, devices=devices,
        **options,
    )  # fmt: skip


def same(ours: list[dict[str, float]], theirs: list[dict[str, float]], rel: float = 1e-4) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=rel, abs=1e-5)


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_packed_rows_train_as_padded_ones(loss, pairs, tiny_llama_dir):
    size = 60 if loss == "kto" else 30  # all of the data in one step, for packed rows are other batches
    padded = run(tiny_llama_dir, pairs, loss, batch_size=size)
    packed = run(tiny_llama_dir, pairs, loss, batch_size=size, packing=True)
    same(padded["steps"], packed["steps"])
    same([padded["val"]], [packed["val"]], rel=1e-3)
    first, last = padded["steps"][0], padded["steps"][-1]
    assert last["loss"] < first["loss"]
    assert last["margin"] > first["margin"]
    if OBJECTIVES[loss].needs_reference:
        # B is 0: the model is its reference, and of pairs neither answer wins.
        assert (first["rewards_chosen"], first["rewards_rejected"]) == pytest.approx((0, 0), abs=1e-5)
        expected = {"dpo": 0.693147, "ipo": 1.0, "kto": 0.5}
        assert first["loss"] == pytest.approx(expected[loss], rel=1e-5)


def test_the_reference_is_the_base_whatever_is_trained(pairs, tiny_llama_dir):
    """Adapters off computes what a model without adapters does, and leaves nothing changed."""
    trained = run(tiny_llama_dir, pairs, "dpo")
    fresh = run(tiny_llama_dir, pairs, "dpo", max_steps=1)["module"]
    for parameter in fresh.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    module, batch = trained["module"], next(iter(trained["data"].val_dataloader()))
    module.train()
    before = [parameter.requires_grad for parameter in module.parameters()]
    off, on = (module.fixed_log_probs(batch, adapters=adapters) for adapters in (False, True))
    torch.testing.assert_close(off, fresh.fixed_log_probs(batch, adapters=True), rtol=0, atol=0)
    assert not off.requires_grad
    assert not torch.allclose(off, on, atol=1e-3)
    assert [parameter.requires_grad for parameter in module.parameters()] == before
    assert module.model.training
    assert all(p.grad is None for p in module.parameters() if not p.requires_grad)


def test_logits_of_a_batch_never_exist_and_gradients_are_those_of_full_logits(pairs, tiny_llama_dir):
    module, data = (run(tiny_llama_dir, pairs, "dpo")[name] for name in ("module", "data"))
    batch = next(iter(data.val_dataloader()))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    chunked = torch.autograd.grad(module.loss_sum(batch)[0], [*trained.values()])
    logits = module(batch["input_ids"])[:, :-1].float()
    labels = batch["labels"][:, 1:]
    log_p = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels != -100)
    chosen, rejected = (log_p.sum(-1) - module.fixed_log_probs(batch, adapters=False)).view(-1, 2).unbind(1)
    full = torch.autograd.grad(-torch.nn.functional.logsigmoid(0.5 * (chosen - rejected)).sum(), [*trained.values()])
    for name, ours, plain in zip(trained, chunked, full, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("strategy", "loss"), [("fsdp2", "dpo"), ("fsdp2", "kto"), ("ddp", "kto"), ("ddp", "orpo")])
def test_two_ranks_train_as_one(strategy, loss, ranks: RankPools, pairs, tiny_llama_dir, tmp_path):
    """With accumulation (but for KTO, whose KL term is of a micro-batch), the reference beside or known beforehand."""
    accumulate = 1 if loss == "kto" else 2
    shared: dict[str, Any] = {"compute": ComputeOptions(checkpoint_activations="all")} if strategy == "fsdp2" else {}
    file = tmp_path / "reference.safetensors" if (strategy, loss) == ("fsdp2", "kto") else None
    one = run(tiny_llama_dir, pairs, loss, batch_size=8, accumulate=accumulate, reference_file=file)
    options = {"batch_size": 4, "accumulate": accumulate, **shared}
    if file is not None:
        options["reference_file"] = tmp_path / "of_two.safetensors"
    two = ranks.run(2, "cpu", on_ranks, tiny_llama_dir, pairs, loss, strategy, "cpu", options, timeout=300)
    for rank in two:
        same(rank["steps"], one["steps"])
        same([rank["val"]], [one["val"]])


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_reference_that_is_known_beforehand_changes_nothing(loss, pairs, tiny_llama_dir, tmp_path):
    file = tmp_path / "reference.safetensors"
    beside = run(tiny_llama_dir, pairs, loss, max_steps=4, packing=True, batch_size=2)
    known = run(tiny_llama_dir, pairs, loss, max_steps=4, packing=True, batch_size=2, reference_file=file)
    same(known["steps"], beside["steps"])
    table = known["module"].reference.table
    assert table.isfinite().all()
    # A run that was killed on the way computes what is missing, in the same batches.
    half = table.clone()
    missing = known["data"].reference_index(1) + known["data"].reference_index(3)
    half[missing] = torch.nan
    reference = known["module"].reference
    with_identity = reference._identity(known["module"], known["data"])
    reference._write(half, with_identity)
    module = run(tiny_llama_dir, pairs, loss, max_steps=4, packing=True, batch_size=2, reference_file=file)
    assert torch.equal(module["module"].reference.table, table)
    assert module["steps"] == known["steps"]


def test_a_resumed_run_goes_on_exactly(pairs, tiny_llama_dir, tmp_path):
    file, options = tmp_path / "reference.safetensors", {"batch_size": 8, "packing": True}
    whole = run(tiny_llama_dir, pairs, "dpo", max_steps=6, reference_file=file, **options)
    run(tiny_llama_dir, pairs, "dpo", max_steps=2, save=tmp_path / "two.ckpt", reference_file=file, **options)
    rest = run(
        tiny_llama_dir, pairs, "dpo", max_steps=6, ckpt=tmp_path / "two.ckpt", reference_file=file, **options
    )  # fmt: skip
    for (name, a), (_, b) in zip(whole["module"].named_parameters(), rest["module"].named_parameters(), strict=True):
        if a.requires_grad:
            assert torch.equal(a, b), name
    other = write_pairs(tmp_path / "other.jsonl", 40)
    with pytest.raises(ValueError, match="does not fit this run"):
        run(tiny_llama_dir, other, "dpo", max_steps=6, ckpt=tmp_path / "two.ckpt", **options)


def test_a_reference_that_began_with_an_adapter_is_that_adapter(pairs, tiny_llama_dir, tmp_path):
    run(tiny_llama_dir, pairs, "simpo")["module"].save_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="Add --precompute_reference"):
        run(tiny_llama_dir, pairs, "dpo", init_adapter=tmp_path / "adapter")
    file = tmp_path / "reference.safetensors"
    more = {"init_adapter": tmp_path / "adapter", "reference_file": file}
    first = run(tiny_llama_dir, pairs, "dpo", save=tmp_path / "three.ckpt", **more)
    assert first["steps"][0]["margin"] == pytest.approx(0, abs=1e-5)  # the model is its reference
    file.unlink()
    with pytest.raises(ValueError, match="has been trained since"):
        run(tiny_llama_dir, pairs, "dpo", ckpt=tmp_path / "three.ckpt", max_steps=6, **more)


def test_compiled_steps_break_no_graph_and_recompile_nothing(pairs, tiny_llama_dir):
    """KTO has all passes: with gradient, and without one, adapters on and off."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs, counts = Graphs("aot_eager"), []

    class Count(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            counts.append(graphs.count)

    options: dict[str, Any] = {"packing": True, "batch_size": 3, "max_steps": 4}
    plain = run(tiny_llama_dir, pairs, "kto", **options)
    compute = ComputeOptions(checkpoint_activations="all", compile="default")
    compiled = run(
        tiny_llama_dir, pairs, "kto", compute=compute, compile_backend=graphs, callbacks=[Count()], **options
    )  # fmt: skip
    same(compiled["steps"], plain["steps"], rel=1e-3)
    assert not torch._dynamo.utils.counters["graph_break"]
    # Rotary embedding and norm one each; the decoder layer with gradient, and without, adapters on and off.
    assert counts == [5] * 4


def test_what_does_not_fit_is_refused(pairs, tiny_llama_dir, tmp_path):
    with pytest.raises(ValueError, match="has no reference model: leave --precompute_reference out"):
        run(tiny_llama_dir, pairs, "orpo", reference_file=tmp_path / "r.safetensors")
    module = QLoRAPreference(tiny_llama_dir, default_lora(4))
    with pytest.raises(ValueError, match="The batch lacks documents, completion_tokens, num_pairs"):
        module.loss_sum({"input_ids": torch.zeros(1, 2)})


def test_a_checkpoint_asks_for_an_objective_that_it_cannot_hold(tiny_llama_dir):
    """Else a model trained with IPO would go on with DPO, the default."""
    assert "objective" not in QLoRAPreference(tiny_llama_dir).hparams
    saved = QLoRAPreference(tiny_llama_dir, objective=PreferenceObjective(ipo)).hparams
    with pytest.raises(
        ValueError, match=r"trained with PreferenceObjective\(.*ipo.* Pass that to load_from_checkpoint"
    ):
        QLoRAPreference(saved["model_dir"], objective=saved["objective"])
