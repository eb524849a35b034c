"""Groups of options: whoever builds one is told what is wrong with it, and each field has its line of help."""

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from peft import LoraConfig

from lightning_qlora.modules.checkpoints.resolve import ModelOptions
from lightning_qlora.modules.cli import flags_of
from lightning_qlora.modules.data.options import BatchOptions, DataOptions
from lightning_qlora.modules.distributed.strategies import StrategyOptions
from lightning_qlora.modules.distributed.trained_checkpoints import CheckpointOptions
from lightning_qlora.modules.hardware import Precision, PrecisionChoice
from lightning_qlora.modules.lora.config import LoraOptions, default_lora, with_targets
from lightning_qlora.modules.losses import cross_entropy
from lightning_qlora.modules.models.options import ComputeOptions
from lightning_qlora.modules.training.options import OptimizationOptions, PreferenceOptions, RunOptions

GROUPS: list[Any] = [
    ModelOptions, DataOptions, BatchOptions, OptimizationOptions, LoraOptions, StrategyOptions, ComputeOptions,
    CheckpointOptions, RunOptions,
]  # fmt: skip


@pytest.mark.parametrize("group", GROUPS)
def test_every_field_has_a_line_of_help_and_the_group_a_title(group: Any) -> None:
    def main(options: group) -> None: ...

    flags = flags_of(main)
    assert [flag.name for flag in flags] == [field.name for field in dataclasses.fields(group)]
    for flag in flags:
        assert flag.help
        assert flag.help.endswith(".")
        assert flag.title
        assert "(" not in flag.title  # a dataclass without a docstring has its signature there


def test_no_two_groups_have_a_field_in_common() -> None:
    names = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        (DataOptions, {"val_samples": -1}, "--val_samples must be at least 0, got -1"),
        (DataOptions, {"show_samples": -1}, "--show_samples must be at least 0, got -1"),
        (DataOptions, {"train_on": "first"}, "--train_on must be 'all' or 'last', got 'first'"),
        (BatchOptions, {"batch_size": 0}, "--batch_size must be at least 1, got 0"),
        (BatchOptions, {"accumulate": 0}, "--accumulate must be at least 1, got 0"),
        (BatchOptions, {"seq_len": 1}, "--seq_len must be at least 2, got 1"),
        (PreferenceOptions, {"loss": "ppo"}, "--loss must be one of dpo, ipo, orpo, kto, simpo, got 'ppo'"),
        (PreferenceOptions, {"beta": 0.0}, r"--beta must be above 0 and finite, got 0\.0"),
        (PreferenceOptions, {"loss": "ipo", "gamma": 1.0}, "--gamma is a setting of --loss simpo; --loss ipo has none"),
        (PreferenceOptions, {"label_smoothing": 0.5}, "--label_smoothing must be below 0.5"),
        (PreferenceOptions, {"loss": "orpo", "precompute_reference": True}, "--loss orpo has no reference model"),
        (OptimizationOptions, {"max_steps": 0}, "--max_steps must be at least 1, got 0"),
        (OptimizationOptions, {"epochs": 0.0}, r"--epochs must be a positive finite number, got 0\.0"),
        (OptimizationOptions, {"seed": -1}, "--seed must be at least 0, got -1"),
        (OptimizationOptions, {"lr": 0.0}, r"--lr: learning_rate must be a positive finite number, got 0\.0"),
        (OptimizationOptions, {"lr": float("inf")}, "learning_rate must be a positive finite number, got inf"),
        (OptimizationOptions, {"clip_norm": -1.0}, r"--clip_norm must be 0 \(no clipping\) or larger, got -1\.0"),
        (OptimizationOptions, {"clip_norm": float("nan")}, "--clip_norm must be 0"),
        (LoraOptions, {"lora_r": 0}, "r must be at least 1, got 0"),
        (LoraOptions, {"lora_alpha": 0}, "lora_alpha must be positive"),
        (LoraOptions, {"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        (ComputeOptions, {"attention": "fast"}, "attention must be one of 'auto', 'sdpa'"),
        (ComputeOptions, {"sliding_window": 0}, "sliding_window must be at least 1"),
        (ComputeOptions, {"compile": "on"}, "compile must be one of 'off', 'default', 'max-autotune', got 'on'"),
        (
            ComputeOptions,
            {"offload_activations": True, "checkpoint_activations": "none"},
            "checkpoint_activations is off",
        ),
        (
            ComputeOptions,
            {"checkpoint_activations": "some"},
            "must be auto, all, none or a number of layers, got 'some'",
        ),
        (ComputeOptions, {"checkpoint_activations": -1}, "must be auto, all, none or a number of layers, got -1"),
        (ComputeOptions, {"memory_limit_gib": 0.0}, "--memory_limit_gib must be above 0"),
        (CheckpointOptions, {"save_every": 0}, "--save_every must be at least 1, got 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(group: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group(**values)


def test_alpha_is_twice_the_rank_unless_given() -> None:
    assert LoraOptions(lora_r=16).config().to_dict() == default_lora(16).to_dict()
    assert (
        LoraOptions(lora_r=16, lora_alpha=8, lora_dropout=0.5).config().to_dict() == default_lora(16, 8, 0.5).to_dict()
    )


def test_an_adapter_to_continue_from_says_what_is_trained(tmp_path) -> None:
    saved = LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["v_proj", "up_proj"], rank_pattern={"up_proj": 2},
        lora_dropout=0.3, layers_to_transform=[1], inference_mode=True, base_model_name_or_path="some/base",
        init_lora_weights="gaussian", task_type="CAUSAL_LM",
    )  # fmt: skip
    saved.save_pretrained(tmp_path)
    found = LoraOptions(init_adapter=tmp_path, lora_dropout=0.1).config()
    expected = {**saved.to_dict(), "inference_mode": False, "base_model_name_or_path": None, "lora_dropout": 0.1}
    assert found.to_dict() == expected | {"init_lora_weights": True}
    same = LoraOptions(init_adapter=tmp_path, lora_r=3, lora_alpha=5, lora_targets="up_proj, v_proj").config()
    assert same.to_dict() == found.to_dict() | {"lora_dropout": 0.0}
    for flag, value, theirs in (
        ("lora_r", 4, 3), ("lora_alpha", 6, 5), ("lora_targets", "v_proj", r"\['up_proj', 'v_proj'\]")
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=rf"^--{flag} is .*, but the adapter in \S+ has {theirs}\. Leave --{flag} out"
        ):
            LoraOptions(init_adapter=tmp_path, **{flag: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"holds no LoRA adapter of peft: adapter_config\.json is missing"):
        LoraOptions(init_adapter=tmp_path / "nothing")


def test_targets_are_the_layers_that_are_named() -> None:
    assert LoraOptions().config().target_modules == "all-linear"
    for targets in ("q_proj,v_proj", ["v_proj", "q_proj"], " q_proj , v_proj,"):
        assert LoraOptions(lora_targets=targets).config().target_modules == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="--lora_targets names no layer"):
        LoraOptions(lora_targets=",")
    with pytest.raises(
        ValueError, match=r"\(--lora_targets\) name 'v_prj', which is no projection .*Choose from q_proj, v_"
    ):
        with_targets(LoraOptions(lora_targets="q_proj,v_prj").config(), ["q_proj", "v_proj"])


def test_the_loss_is_cross_entropy_with_what_is_asked_for() -> None:
    assert OptimizationOptions().loss is cross_entropy
    logits, labels = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 0, 6])
    found = OptimizationOptions(label_smoothing=0.1, z_loss=1e-2).loss(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(found, expected + 1e-2 * logits.logsumexp(-1).square())
    for wrong in ({"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": -1.0}, {"z_loss": math.inf}):
        with pytest.raises(ValueError, match=f"--{next(iter(wrong))} must be"):
            OptimizationOptions(**wrong)


def test_epochs_come_to_steps() -> None:
    assert OptimizationOptions(epochs=1.5, lr=1.0).in_steps(7) == OptimizationOptions(max_steps=11, lr=1.0)
    assert OptimizationOptions(max_steps=9).in_steps(7).max_steps == 9


def test_a_twentieth_of_the_steps_warms_up() -> None:
    assert [OptimizationOptions(max_steps=n).warmup_steps for n in (1, 19, 20, 100)] == [0, 0, 1, 5]


def test_choices_stand_in_one_place() -> None:
    assert get_args(PrecisionChoice) == ("auto", *get_args(Precision))
    assert get_type_hints(StrategyOptions)["precision"] == PrecisionChoice
    assert RunOptions(Path("runs")).output_dir == Path("runs")
