"""The main recipe: equal losses on one device, on two, in stock libraries, and after any death."""

import gc
import json
import math
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from lightning_qlora.callbacks.report import load_report, write_json
from lightning_qlora.modules import hardware
from lightning_qlora.modules.checkpoints.demo_model import DEMO_MODEL
from lightning_qlora.modules.checkpoints.resolve import resolve_model
from lightning_qlora.modules.cli import flags_of, run_recipe
from lightning_qlora.modules.data.data_module import ChatDataModule
from lightning_qlora.modules.data.stdlib_docs import stdlib_api_cards
from lightning_qlora.modules.export.merge import merge_adapter
from lightning_qlora.modules.models.families import FAMILIES
from tests.distributed import RankPools
from tests.recipes.runs import (
    GLOBAL_BATCH,
    STEPS,
    Flags,
    Run,
    arguments,
    checkpoints,
    difference,
    on,
    recipe_module,
    run_here,
    train_in_pool,
)

# --------------------------------------------------------------------------------------------------------------- parity


def write_stock_adapter(model_dir: Path, directory: Path, r: int) -> Path:
    """An adapter as peft itself makes it, with B not zero, so that A has a gradient from the first step."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    torch.manual_seed(1)
    lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(FAMILIES["llama"].projections), task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(directory)
    return directory


def stock_losses(model_dir: Path, adapter: Path, flags: Mapping[str, Any]) -> list[float]:
    """The training that the recipe promises, on stock transformers, peft and bitsandbytes' Linear4bit.

    One sample at a time, without padding: each step's loss is the mean over all completion tokens of its samples.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, quantization_config=quantization, device_map="cpu"
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it repacks weights in eval mode, and gradients are lost
    model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}

    data = ChatDataModule(
        AutoTokenizer.from_pretrained(model_dir),
        flags["dataset"],
        batch_size=GLOBAL_BATCH,
        seq_len=flags["seq_len"],
    )
    data.load()
    assert data.train_set is not None
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < flags["max_steps"]:
        order = np.random.default_rng([flags["seed"], epoch]).permutation(len(data.train_set)).tolist()
        a_step = GLOBAL_BATCH * flags["accumulate"]
        steps += [order[first : first + a_step] for first in range(0, len(order), a_step)]
        epoch += 1

    optimizer = torch.optim.AdamW(parameters, lr=flags["lr"], weight_decay=0.0)
    warmup, losses = flags["max_steps"] // 20, []
    for step, samples in enumerate(steps[: flags["max_steps"]]):
        decayed = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (flags["max_steps"] - warmup)))
        factor = (step + 1) / (warmup + 1) if step < warmup else decayed
        rows = [data.train_set[i] for i in samples]
        count = sum(label != -100 for row in rows for label in row["labels"][1:])
        total = 0.0
        optimizer.zero_grad()
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            labels = torch.tensor(row["labels"][1:])
            loss = torch.nn.functional.cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = flags["lr"] * factor
        optimizer.step()
        losses.append(total)
    return losses


def test_two_devices_train_as_one_and_as_stock_libraries(
    ranks: RankPools,
    flags: Flags,
    tiny_llama_dirs: Mapping[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model_dir = tiny_llama_dirs["aligned"]  # bitsandbytes' CPU kernel is wrong for rows that are not whole blocks
    adapter = write_stock_adapter(model_dir, tmp_path / "adapter", r=4)
    flags = flags | {"model": model_dir, "init_adapter": adapter, "max_steps": 12}  # three epochs
    two, one = (train_in_pool(ranks, n, flags | on(n, tmp_path / f"{n}")) for n in (2, 1))
    stock = stock_losses(model_dir, adapter, flags)
    to_one, to_stock = difference(two["losses"], one["losses"]), difference(two["losses"], stock)
    with capsys.disabled():
        print(f"\n2 devices to 1: {to_one:.1e}, to stock libraries: {to_stock:.1e}; {stock[0]:.3f} -> {stock[-1]:.3f}")
    assert (two["world_size"], one["world_size"]) == (2, 1)
    assert min(stock) < 0.8 * stock[0]  # it learns: a run that does nothing would agree with itself as well
    assert to_one <= 1e-5
    assert to_stock <= 1e-3
    assert two["val_losses"] == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in one["val_losses"]]
    assert len(two["val_losses"]) > 0


def test_packed_rows_train_on_two_devices_as_on_one(ranks: RankPools, flags: Flags, tmp_path: Path) -> None:
    flags = flags | {"packing": True, "sliding_window": 40, "max_steps": 6, "timeout_minutes": 2}
    two, one = (train_in_pool(ranks, n, flags | on(n, tmp_path / f"{n}")) for n in (2, 1))
    assert difference(two["losses"], one["losses"]) <= 1e-5
    assert two["losses"][-1] < two["losses"][0]
    data = two["sections"]["data"]
    assert data["train_samples"] == 25
    assert data["train_packs"] < 20
    assert data["fill"] > 0.8


def test_a_base_model_learns_a_format_that_goes_into_the_merged_model(
    ranks: RankPools, flags: Flags, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """A base without a chat template, data and validation data of its own, and turns that it does not stop at."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama_dir, base)
    (base / "chat_template.jinja").unlink()
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (tmp_path / "val.csv").write_text("question,answer\nwhat?,red\n")
    run = flags | on(1, tmp_path / "run") | {
        "model": base, "chat_template": template, "val_dataset": tmp_path / "val.csv", "epochs": 1, "show_samples": 1,
    }  # fmt: skip
    del run["max_steps"]
    assert ranks.run(1, "cpu", run_here, run) == [0]
    report = load_report(tmp_path / "run" / "report.json")
    data: Any = report["sections"]["data"]
    assert (data["train_samples"], data["val_samples"]) == (27, 1)
    assert len(report["losses"]) == 4  # 7 global batches, 2 of them a step
    assert data["samples"][0]["runs"][0][0].startswith("user: say 0 ")

    merged = merge_adapter(base, tmp_path / "run" / "adapters" / "step=4", tmp_path / "merged").directory
    assert AutoTokenizer.from_pretrained(merged).chat_template == template.read_text()
    for directory in (merged, tmp_path / "run" / "adapter"):
        assert GenerationConfig.from_pretrained(directory).eos_token_id == [2, 0]


@pytest.mark.slow
def test_the_demo_model_trains_as_in_stock_libraries(
    ranks: RankPools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = resolve_model(DEMO_MODEL)
    cards = stdlib_api_cards()[:GLOBAL_BATCH]  # the same in each step, so that two updates are seen to teach them
    dataset = tmp_path / "cards.jsonl"
    dataset.write_text("".join(json.dumps(card) + "\n" for card in cards))
    adapter = write_stock_adapter(directory, tmp_path / "adapter", r=8)
    flags: Flags = {
        "model": DEMO_MODEL, "dataset": dataset, "max_steps": 3, "accumulate": 1, "seq_len": 96, "precision": "32-true",
        "lr": 1e-3, "lora_r": 8, "lora_alpha": 16, "seed": 3, "init_adapter": adapter,
        "prompt": "Say only: yes",  # an answer of few tokens
    }  # fmt: skip
    two = train_in_pool(ranks, 2, flags | on(2, tmp_path / "two"), timeout=300)
    stock = stock_losses(directory, adapter, flags)
    to_stock = difference(two["losses"], stock)
    with capsys.disabled():
        print(f"\ndemo model to stock libraries: {to_stock:.1e}; {stock[0]:.3f} -> {stock[-1]:.3f}")
    assert stock[-1] < stock[0]
    assert to_stock <= 1e-3


# -------------------------------------------------------------------------------------------------- deaths and resuming


def test_a_run_stopped_by_signals_resumes_exactly(ranks: RankPools, flags: Flags, whole: Path, tmp_path: Path) -> None:
    """SIGTERM to rank 0 alone; then Ctrl-C, which reaches every process of the group; then on to the end."""
    flags = flags | on(2, tmp_path / "run") | {"save_every": 100}  # only what the signals leave
    stops: list[int] = []
    for signum, after in ((signal.SIGTERM, random.randint(2, 6)), (signal.SIGINT, random.randint(11, 16))):
        with Run(flags | {"resume": bool(stops)}) as run:
            run.wait_for_step(after)
            if signum == signal.SIGTERM:
                os.kill(run.process.pid, signum)
            else:
                os.killpg(run.process.pid, signum)
            assert run.wait(60) == 128 + signum, run.text
        assert "Traceback" not in run.text
        report = load_report(tmp_path / "run" / "report.json")
        assert report["status"] == "interrupted"
        assert after <= report["global_step"] < STEPS
        stops.append(report["global_step"])
        assert f"interrupted-step={stops[-1]}.ckpt" in checkpoints(tmp_path / "run")
    last = train_in_pool(ranks, 2, flags | {"resume": True})
    assert last["resumed_from_step"] == stops[-1]
    assert last["losses"] == load_report(whole / "report.json")["losses"]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return recipe_module("fsdp2_qlora")


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below, with its bytes and when it was written."""
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def refused(
    recipe: ModuleType,
    flags: Flags,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., None]:
    """``refused(message, **flags)``: exit code 2, a message that matches, no training, and output_dir as it was."""

    def no_training(*_: object, **__: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(recipe.L.Trainer, "fit", no_training)

    def check(message: str, without: str = "", **changes: object) -> None:
        merged = flags | {"output_dir": tmp_path / "run", "devices": 2} | changes
        merged.pop(without, None)
        output_dir = Path(str(merged["output_dir"]))
        before = contents(output_dir) if output_dir.exists() else None
        capsys.readouterr()
        assert run_recipe(recipe.main, arguments(merged)) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert "Traceback" not in error
        gc.collect()  # what the error's traceback holds, such as the claim on the directory
        assert (contents(output_dir) if output_dir.exists() else None) == before

    return check


def test_bad_models_are_refused(refused: Callable[..., None], tiny_llama_dir: Path, tmp_path: Path) -> None:
    refused("no model directory or GGUF file '/no/such/model'", model="/no/such/model")
    without_weights = tmp_path / "without weights"
    without_weights.mkdir()
    refused("no config.json", model=without_weights)
    shutil.copy(tiny_llama_dir / "config.json", without_weights)
    refused(r"holds no \*\.safetensors weights", model=without_weights)
    other_kind = tmp_path / "gpt2"
    shutil.copytree(tiny_llama_dir, other_kind)
    (other_kind / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    refused("is a 'gpt2' model", model=other_kind)
    truncated = tmp_path / "truncated"
    shutil.copytree(tiny_llama_dir, truncated)
    (truncated / "model.safetensors").write_bytes((tiny_llama_dir / "model.safetensors").read_bytes()[:-100])
    refused("model.safetensors is damaged", model=truncated)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.jsonl", None, "missing.jsonl: no such file"),
        ("empty.jsonl", "", "the data set is empty"),
        ("empty.json", "[]", "the data set is empty"),
        ("broken.jsonl", '{"prompt": "p", "completion": "c"}\n{"prompt": \n', "line 2: not JSON at column 12"),
        (
            "fields.json",
            '[{"prompt": "p", "completion": "c"}, {"text": "t"}]',
            r"1 of 2 rows .*\n  row 2: found the fields \['text'\]",
        ),
    ],
)
def test_bad_data_are_refused(
    refused: Callable[..., None], tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    refused(message, dataset=tmp_path / name)


def test_completions_that_are_cut_away_are_refused(refused: Callable[..., None]) -> None:
    refused("seq_len=8 cuts away the completion of all 27 samples", seq_len=8)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("lora_r", 0, "r must be at least 1, got 0"),
        ("lora_r", -4, "r must be at least 1, got -4"),
        ("lora_alpha", 0, "lora_alpha must be positive"),
        ("max_steps", -1, "--max_steps must be at least 1, got -1"),
        ("batch_size", 0, "--batch_size must be at least 1"),
        ("accumulate", 0, "--accumulate must be at least 1"),
        ("lr", -1e-3, "learning_rate must be a positive finite number"),
        ("seq_len", 1, "seq_len must be at least 2"),
        ("seed", -1, "seed must be at least 0"),
        ("devices", 0, "devices must be at least 1"),
        ("sliding_window", 0, "sliding_window must be at least 1"),
        ("clip_norm", -1.0, r"--clip_norm must be 0 \(no clipping\) or larger, got -1\.0"),
        ("num_nodes", 2, "num_nodes=2 but nothing says which of these machines this is"),
        ("shard_size", 3, "shard_size=3 does not divide the 2 ranks"),
        ("save_every", 0, "--save_every must be at least 1"),
        ("timeout_minutes", 0, "--timeout_minutes must be at least 1"),
        ("attention", "flash", "attention='flash' needs compute capability 8.0 and 16 bit, but this is the CPU"),
        ("devices", 10_000, "devices=10000"),
        ("init_adapter", "/no/such/adapter", "holds no LoRA adapter of peft: adapter_config.json is missing"),
    ],
)
def test_flags_out_of_range_are_refused(refused: Callable[..., None], flag: str, value: object, message: str) -> None:
    refused(message, **{flag: value})


@pytest.mark.parametrize(
    ("flag", "value"),
    [("precision", "8-bit"), ("max_steps", "many"), ("lr", "nan"), ("lr", "inf"), ("no_such_flag", 1)],
)
def test_flags_of_the_wrong_kind_are_refused(
    recipe: ModuleType, capsys: pytest.CaptureFixture[str], flag: str, value: object
) -> None:
    with pytest.raises(SystemExit) as refusal:
        run_recipe(recipe.main, [f"--{flag}={value}"])
    assert refusal.value.code == 2
    assert flag in capsys.readouterr().err


def test_a_learning_rate_that_is_no_number_is_refused_in_a_file_too(
    refused: Callable[..., None], tmp_path: Path
) -> None:
    """YAML has NaN as a number, which the command line takes for a word."""
    (tmp_path / "flags.yaml").write_text("lr: .nan\n")
    refused("learning_rate must be a positive finite number, got nan", without="lr", config=tmp_path / "flags.yaml")


def test_hardware_that_is_not_there_is_refused(refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with one T4."""
    t4 = hardware.Capabilities("cuda", "Tesla T4", (7, 5), 15 * 2**30, bf16=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(hardware, "capabilities", lambda index=0: t4)
    refused(r"devices=2 but this machine has 1 CUDA device\(s\)", precision="16-mixed")
    for precision in ("bf16-mixed", "bf16-true"):
        refused("device 0 is a Tesla T4 with 7.5. Use precision='16-mixed'", devices=1, precision=precision)


def test_a_directory_with_a_run_is_not_overwritten(
    refused: Callable[..., None], whole: Path, tmp_path: Path, chats: Path
) -> None:
    refused("already holds a run. Continue it with --resume", output_dir=whole)
    refused("is a file. Name a directory", output_dir=chats)
    refused("no run to resume", resume=True)
    refused("no run to resume", resume=True, output_dir=tmp_path)


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of ``whole``, to damage."""
    return Path(shutil.copytree(whole, tmp_path / "finished"))


def latest(output_dir: Path) -> Path:
    return max((output_dir / "checkpoints").iterdir(), key=lambda path: int(path.stem.rpartition("=")[2]))


def test_a_checkpoint_of_something_else_is_refused(
    refused: Callable[..., None], finished: Path, tiny_llama_dirs: Mapping[str, Path]
) -> None:
    resume: Flags = {"resume": True, "output_dir": finished}
    refused("another model or LoRA shape: fingerprint is", **resume, model=tiny_llama_dirs["other"])
    refused("lora_r is 4 there and 8 here", **resume, lora_r=8)
    refused(r"lora_alpha is 8\.0 there and 16\.0 here", **resume, lora_alpha=16)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(refused: Callable[..., None], finished: Path, kept: float) -> None:
    damaged = latest(finished)
    damaged.write_bytes(damaged.read_bytes()[: int(kept * damaged.stat().st_size)])
    refused(rf"{damaged.name} is damaged.*Others in .*: step={STEPS - 1}.ckpt", resume=True, output_dir=finished)


@pytest.fixture(scope="module")
def sharded(ranks: RankPools, flags: Flags, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run on two devices that wrote sharded checkpoints on the side. Read only."""
    output_dir = tmp_path_factory.mktemp("sharded") / "run"
    saving = {"sharded_checkpoints": True, "async_save": True, "max_steps": 3}
    train_in_pool(ranks, 2, flags | on(2, output_dir) | saving)
    return output_dir


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "__1_0.distcp").unlink(), r"__1_0\.distcp is missing"),
        (lambda path: os.truncate(path / "__0_0.distcp", 100), r"__0_0\.distcp has 100 bytes instead of \d+"),
        (lambda path: os.truncate(path / "meta.pt", 100), "RuntimeError"),
    ],
    ids=["missing shard", "truncated shard", "truncated rest"],
)
def test_a_damaged_sharded_checkpoint_is_refused_and_the_previous_one_offered(
    refused: Callable[..., None], sharded: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    output_dir = Path(shutil.copytree(sharded, tmp_path / "copy"))
    damage(latest(output_dir))
    refused(rf"step=3\.ckpt is damaged.*{message}.*Others in .*: step=2\.ckpt", resume=True, output_dir=output_dir)
    shutil.rmtree(latest(output_dir))  # as the message says
    with pytest.raises(AssertionError, match="training began"):
        refused("", resume=True, output_dir=output_dir)


def test_what_is_no_checkpoint_is_refused(refused: Callable[..., None], finished: Path) -> None:
    latest(finished).write_text("not a checkpoint")
    refused("is damaged or incomplete", resume=True, output_dir=finished)
    torch.save({"weights": torch.ones(2)}, latest(finished))
    refused("no training checkpoint", resume=True, output_dir=finished)


def test_a_checkpoint_of_other_data_is_refused_by_both_processes(flags: Flags, finished: Path) -> None:
    """Found only once the Trainer runs; the run's own files must survive that too."""
    before = contents(finished)
    with Run(flags | on(2, finished) | {"batch_size": 3, "resume": True, "max_steps": STEPS + 5}) as run:
        assert run.wait() == 2, run.text
    assert "global_batch_size 4 -> 6" in run.text
    assert "Traceback" not in run.text
    assert contents(finished) == before


def test_a_run_killed_after_its_last_checkpoint_is_ended_by_resuming(
    ranks: RankPools, flags: Flags, whole: Path, finished: Path
) -> None:
    """No step is left, and yet the ranks gather the adapter, and the report is the whole run's."""
    before = load_report(whole / "report.json")
    shutil.rmtree(finished / "adapter")
    write_json(finished / "report.json", before | {"status": "running", "losses": [], "global_step": 0})
    after = train_in_pool(ranks, 2, flags | on(2, finished) | {"resume": True})
    assert after == before | {"end_time": after["end_time"]}
    adapter = Path("adapter", "adapter_model.safetensors")
    assert (finished / adapter).read_bytes() == (whole / adapter).read_bytes()


def test_a_run_without_a_checkpoint_is_not_overwritten(refused: Callable[..., None], finished: Path) -> None:
    shutil.rmtree(finished / "checkpoints")
    refused(r"no checkpoint to go on from.*--init_adapter \S*/finished/adapter", resume=True, output_dir=finished)


def test_a_directory_that_cannot_be_made_is_refused(refused: Callable[..., None], chats: Path) -> None:
    refused(r"output_dir .*chats\.jsonl/run cannot be written \(NotADirectoryError", output_dir=chats / "run")


def test_the_report_has_all_flags_and_a_resumed_run_names_those_that_changed(
    refused: Callable[..., None], recipe: ModuleType, flags: Flags, whole: Path, finished: Path
) -> None:
    report = load_report(whole / "report.json")
    written = {"model": report["model"], **report["metadata"]}
    given = flags | on(2, whole)
    assert written.keys() == {flag.name for flag in flags_of(recipe.main)}
    assert {name: written[name] for name in given} == {
        name: str(value) if isinstance(value, Path) else value for name, value in given.items()
    }
    resume: Flags = {"resume": True, "output_dir": finished, "batch_size": 2}
    with (
        pytest.raises(AssertionError, match="training began"),
        pytest.warns(UserWarning, match=r"last started: lr 0\.005 -> 0\.03\. lr has no effect"),
    ):
        refused("", **resume, lr=0.03)
