"""Flags made from a function signature, and that importing this package changes no other library."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from lightning_qlora.modules.cli import as_metadata, positive, run_again, run_recipe

CALLS: list[dict[str, object]] = []


def recipe(
    steps: int = 3,
    precision: Literal["32-true", "16-mixed"] = "32-true",
    output_dir: Path = Path("out"),
    lr: float = 3e-4,
    resume: bool = False,
    report: bool = True,
    prompt: str | None = None,
) -> int | None:
    """Train.

    Args:
        steps: How many optimizer steps.
        precision: Of the products.
        output_dir: Where files go.
        lr: Peak learning rate.
        resume: Go on from the latest checkpoint.
        report: Whether to write one.
        prompt: What to ask.
    """
    positive(steps=steps)
    CALLS.append({"steps": steps, "precision": precision, "output_dir": output_dir, "lr": lr, "resume": resume,
                  "report": report, "prompt": prompt})  # fmt: skip
    return 7 if steps == 77 else None


DEFAULTS = {"steps": 3, "precision": "32-true", "output_dir": Path("out"), "lr": 3e-4, "resume": False, "report": True,
            "prompt": None}  # fmt: skip


def called(*args: str) -> dict[str, object]:
    """What ``recipe`` got, where it differs from its defaults."""
    CALLS.clear()
    assert run_recipe(recipe, list(args)) == 0
    (call,) = CALLS
    assert call.keys() == DEFAULTS.keys()
    return {name: value for name, value in call.items() if value != DEFAULTS[name]}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], {}),
        (["--steps", "5", "--lr=1e-3"], {"steps": 5, "lr": 1e-3}),
        (["--resume"], {"resume": True}),
        (["--resume=true"], {"resume": True}),
        (["--resume=false", "--report=false"], {"report": False}),
        (["--no_report"], {"report": False}),
        (["--precision", "16-mixed", "--prompt", "Why?"], {"precision": "16-mixed", "prompt": "Why?"}),
        (["--output_dir", "a/b"], {"output_dir": Path("a/b")}),
    ],
)
def test_flags_become_parameters(args, expected):
    assert called(*args) == expected


def test_flags_become_metadata():
    metadata = as_metadata(DEFAULTS)
    assert metadata == DEFAULTS | {"output_dir": "out"}
    assert json.loads(json.dumps(metadata)) == metadata


def test_flags_come_from_a_file_and_the_command_line_wins(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("steps: 9\nresume: true\nprecision: 16-mixed\n")
    expected = {"steps": 4, "resume": True, "precision": "16-mixed"}
    assert called("--config", str(config), "--steps", "4") == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--precision", "16"], "32-true.*16-mixed|16-mixed.*32-true"),
        (["--steps", "many"], "steps"),
        (["--stpes", "3"], "stpes"),
        (["--resume=maybe"], "resume"),
        (["--config", "no-such.yaml"], "no-such.yaml"),
    ],
)
def test_wrong_flags_end_before_the_recipe_begins(args, message, capsys):
    CALLS.clear()
    with pytest.raises(SystemExit) as stopped:
        run_recipe(recipe, args)
    assert stopped.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert not CALLS


def test_help_shows_the_docstring_types_and_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_recipe(recipe, ["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "Flags made from a function signature",
        "How many optimizer steps. (type: int, default: 3)",
        "Go on from the latest checkpoint.",
        "{32-true,16-mixed}",
        "--config",
    ):
        assert part in text


def test_the_status_is_the_recipes_and_a_users_mistake_is_one_message(capsys, monkeypatch):
    monkeypatch.delenv("LIGHTNING_QLORA_TRACEBACK", raising=False)
    assert run_recipe(recipe, ["--steps", "77"]) == 7
    assert run_recipe(recipe, ["--steps", "-1"]) == 2
    error = capsys.readouterr().err
    assert error.endswith("error: --steps must be at least 1, got -1.\n")
    assert "Traceback" not in error
    monkeypatch.setenv("LIGHTNING_QLORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="--steps must be at least 1"):
        run_recipe(recipe, ["--steps", "-1"])


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_grows_in_segments_unless_the_user_says_otherwise(monkeypatch, own):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "backend:native")  # so that what there was comes back
        if name != own:
            monkeypatch.delenv(name)
    run_recipe(recipe, ["--steps", "77"])
    expected = {own: "backend:native"} if own else {names[0]: "expandable_segments:True"}
    assert {name: os.environ[name] for name in names if name in os.environ} == expected


@pytest.mark.parametrize(("ending", "status"), [("sys.exit(5)", 5), ("os.kill(os.getpid(), 9)", 137), ("", 0)])
def test_a_script_runs_again_with_more_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, status: int
) -> None:
    script, output = tmp_path / "script.py", tmp_path / "output"
    script.write_text(
        "import os, pathlib, sys\n"
        f"pathlib.Path({str(output)!r}).write_text(repr((sys.argv[1:], os.environ['NEW'], os.environ['OLD'])))\n"
        f"{ending}\n"
    )
    monkeypatch.setattr(sys, "argv", [str(script), "--steps=3"])
    monkeypatch.setenv("OLD", "old")
    assert run_again("--run", "a name", NEW="new") == status
    assert output.read_text() == repr((["--steps=3", "--run", "a name"], "new", "old"))


UNPATCHED = '''
import importlib, pkgutil, sys
import torch, torch.distributed.fsdp, transformers, peft, bitsandbytes, lightning.pytorch
import peft.tuners.lora, transformers.modeling_utils, transformers.models.llama.modeling_llama

ROOTS = ("torch", "transformers", "peft", "bitsandbytes")

def attributes():
    """Every attribute of every loaded module of these libraries, and of the classes defined there."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ROOTS or module is None:
            continue
        for attribute, value in list(vars(module).items()):
            found[name, attribute] = value
            if isinstance(value, type) and value.__module__ == name:
                for member, inner in list(vars(value).items()):
                    if callable(inner) or isinstance(inner, (property, staticmethod, classmethod)):
                        found[name, attribute, member] = inner
    return found

def replaced(before):
    """Functions and classes that are not what they were; counters, caches and lazily loaded modules may be."""
    after = attributes()
    return [key for key, value in before.items() if callable(value) and after.get(key) is not value]

before = attributes()
import lightning_qlora
names = [m.name for m in pkgutil.walk_packages(lightning_qlora.__path__, "lightning_qlora.")]
for package in ("kernels", "modules", "callbacks"):
    parent = importlib.import_module(f"lightning_qlora.{package}")
    names += [f"{parent.__name__}.{m.name}" for m in pkgutil.iter_modules(parent.__path__)]
for name in names:
    importlib.import_module(name)
assert len(names) >= 15, names
assert len(before) > 20_000, len(before)
print("replaced:", replaced(before))
transformers.models.llama.modeling_llama.LlamaAttention.forward = lambda self: None
torch.nn.functional.linear = lambda x: None
print("detected:", sorted(replaced(before)))
'''


def test_importing_this_package_patches_no_library():
    result = subprocess.run([sys.executable, "-c", UNPATCHED], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith(("replaced:", "detected:"))]
    assert lines[0] == "replaced: []"
    # The search does find a patched function, and a patched method.
    assert "('torch.nn.functional', 'linear')" in lines[1]
    assert "('transformers.models.llama.modeling_llama', 'LlamaAttention', 'forward')" in lines[1]
