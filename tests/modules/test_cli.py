"""Flags made from a function signature, and that importing this package changes no other library."""

import json
import os
import re
import subprocess
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from lightning_qlora.modules.cli import Only, as_metadata, flags_of, group_flags, positive, run_again, run_recipe

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


# --------------------------------------------------------------------------------------------------- groups of flags


@dataclass(frozen=True)
class Adapters:
    """Small adapters.

    Args:
        rank: Their rank.
        alpha: Their scale, 100 % of it.
        start: Where they come from.
        trained: Whether they learn.
    """

    rank: int = 8
    alpha: int | None = None
    start: Path | None = None
    trained: bool = True

    def __post_init__(self) -> None:
        positive(rank=self.rank)


@dataclass(frozen=True)
class Output:
    """Output of the run.

    Args:
        output_dir: Where files go.
        html: Whether to write a page.
    """

    output_dir: Path
    html: bool = False


GROUPS: list[tuple[Adapters, Output, int]] = []


def grouped(
    output: Output,
    adapters: Annotated[Adapters, Only("alpha", "rank", "trained")] = Adapters(rank=4, start=Path("here")),
    steps: int = 3,
) -> None:
    """Train.

    Args:
        output: A group.
        adapters: A group.
        steps: How many.
    """
    GROUPS.append((adapters, output, steps))


def got(*args: str) -> tuple[Adapters, Output, int]:
    GROUPS.clear()
    assert run_recipe(grouped, ["--output_dir=out", *args]) == 0
    (call,) = GROUPS
    return call


def test_groups_are_flat_flags_with_the_defaults_of_the_signature(tmp_path):
    default = Adapters(4, None, Path("here"))
    assert got() == (default, Output(Path("out")), 3)
    assert got("--rank=5", "--html", "--trained=false") == (
        Adapters(5, None, Path("here"), trained=False),
        Output(Path("out"), html=True),
        3,
    )
    config = tmp_path / "config.yaml"
    config.write_text("alpha: 9\nhtml: true\nsteps: 2\n")
    assert got(f"--config={config}", "--steps=1") == (Adapters(4, 9, Path("here")), Output(Path("out"), True), 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rank=many"], "rank"),
        (["--start=there"], "start"),  # not among Only's
        (["--adapters.rank=3"], "adapters.rank"),
        ([], "output_dir"),  # has no default
    ],
)
def test_wrong_flags_of_groups_end_before_the_recipe_begins(args, message, capsys):
    GROUPS.clear()
    with pytest.raises(SystemExit) as stopped:
        run_recipe(grouped, args if "output_dir" in message else ["--output_dir=out", *args])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not GROUPS


def test_a_groups_own_check_is_one_message(capsys, monkeypatch):
    monkeypatch.delenv("LIGHTNING_QLORA_TRACEBACK", raising=False)
    assert run_recipe(grouped, ["--output_dir=out", "--rank=0"]) == 2
    error = capsys.readouterr().err
    assert error.endswith("error: --rank must be at least 1, got 0.\n")
    assert "Traceback" not in error


def test_flags_of_which_one_may_be_given_are_told_from_the_recipes_defaults(capsys, monkeypatch, tmp_path):
    """A recipe's own default of one of them is no choice of the user's."""
    monkeypatch.delenv("LIGHTNING_QLORA_TRACEBACK", raising=False)
    monkeypatch.setattr(Adapters, "EXCLUSIVE", (("rank", "alpha"),), raising=False)
    assert got("--alpha=9")[0] == Adapters(4, 9, Path("here"))
    config = tmp_path / "config.yaml"
    config.write_text("rank: 5\n")
    assert run_recipe(grouped, ["--output_dir=out", f"--config={config}", "--alpha=9"]) == 2
    assert capsys.readouterr().err.endswith("error: --rank and --alpha are both given. Give one.\n")


def test_help_shows_each_flag_once_under_the_title_of_its_group(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        run_recipe(grouped, ["--help"])
    text = capsys.readouterr().out
    own, groups = text.split("\nOutput of the run:\n")
    output, adapters = groups.split("\nSmall adapters:\n")
    assert "How many. (type: int, default: 3)" in own
    assert "Where files go. (required" in output
    assert "Whether to write a page. (type: bool, default: False)" in output
    assert "Their rank. (type: int, default: 4)" in adapters
    assert "Their scale, 100 % of it. (type: int | null, default: null)" in adapters
    assert "--start" not in text
    for name in ("output_dir", "html", "rank", "alpha", "trained", "steps"):
        assert len(re.findall(rf"^  --{name}\b", text, re.MULTILINE)) == 1


def test_a_recipe_can_be_called_with_flags_by_name():
    assert group_flags(grouped, {"output_dir": Path("a"), "alpha": 2, "steps": 5}) == {
        "output": Output(Path("a")),
        "adapters": Adapters(4, 2, Path("here")),
        "steps": 5,
    }
    with pytest.raises(TypeError, match=r"has no flags \['start'\]"):
        group_flags(grouped, {"output_dir": Path("a"), "start": Path("b")})
    with pytest.raises(ValueError, match="--rank must be at least 1"):
        group_flags(grouped, {"output_dir": Path("a"), "rank": 0})


def test_flags_say_what_they_are():
    flags = {flag.name: flag for flag in flags_of(grouped)}
    assert [*flags] == ["output_dir", "html", "rank", "alpha", "trained", "steps"]
    assert (flags["output_dir"].default, flags["rank"].default, flags["steps"].title) == (MISSING, 4, None)

    def twice(adapters: Adapters, rank: int = 3) -> None: ...

    def unknown(adapters: Annotated[Adapters, Only("size")]) -> None: ...

    with pytest.raises(TypeError, match=r"has the flags \['rank'\] more than once"):
        flags_of(twice)
    with pytest.raises(TypeError, match=r"Adapters has no fields \['size'\]"):
        flags_of(unknown)


def test_groups_become_flat_metadata():
    flags = {"adapters": Adapters(start=Path("here")), "steps": 3}
    assert as_metadata(flags) == {"rank": 8, "alpha": None, "start": "here", "trained": True, "steps": 3}


# ------------------------------------------------------------------------------------------------------- environment


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
    names += [m.name for m in pkgutil.walk_packages(parent.__path__, f"{parent.__name__}.")]
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
