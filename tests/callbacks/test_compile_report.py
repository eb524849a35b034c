"""Planted graph breaks, recompilations and modules that are not compiled, found by their lines."""

import json
import re
import timeit
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_qlora.callbacks.compile_report
from lightning_qlora.callbacks import CompileReport, CompileReportError, CompileSection, RunReport, load_report
from tests.distributed import RankPools, groups

Make = Callable[..., Any]


class BreakingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        print(end="")  # planted: function
        return 2 * grad


def breaking_hook(grad: Tensor) -> Tensor:
    print(end="")  # planted: hook
    return grad


class Block(nn.Module):
    """Breaks the graph in the way that ``kind`` names."""

    def __init__(self, kind: str = "clean") -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.kind == "print":
            print(end="")  # planted: print
        elif self.kind == "branch":
            if x.sum() > 0:  # planted: branch
                x = 2 * x
        elif self.kind == "item":
            x = x * x.sum().item()  # planted: item
        elif self.kind == "library":
            x = x * len(json.dumps({"a": 1}))  # planted: library
        elif self.kind == "shape":
            if x.shape[0] > 2:
                print(end="")  # planted: shape
        elif self.kind == "loop":
            for _ in range(2):
                print(end="")  # planted: loop
        elif self.kind == "try":
            try:
                print(end="")  # planted: try
            finally:
                x = x + 1
        elif self.kind == "hook":
            x.register_hook(breaking_hook)
        elif self.kind == "function":
            x = BreakingBackward.apply(x)
        return x.tanh()


class Net(nn.Module):
    """``blocks``, the first of ``kind``, each compiled."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(kind), Block()])
        for block in self.blocks:
            block.compile(**{"backend": "aot_eager", **options})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # As behind an embedding: without, the first block's input alone needs no gradient, which is another graph.
        return self.net(batch.requires_grad_()).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def batches(*rows: int) -> DataLoader[Tensor]:
    torch.manual_seed(0)
    return DataLoader([torch.randn(count, 4) for count in rows], batch_size=None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def fit(trainer: Make) -> Callable[..., CompileSection]:
    """``fit(report, net, *rows, **options)`` trains on batches of those rows and returns the report's section."""

    def run(
        report: CompileReport, net: nn.Module, *rows: int, callbacks: tuple[Callback, ...] = (), **options: Any
    ) -> Any:
        defaults: dict[str, Any] = {"max_steps": len(rows), "enable_checkpointing": False, "num_sanity_val_steps": 0}
        trainer(report, *callbacks, **{**defaults, **options}).fit(Module(net), batches(*rows))
        return report.report_section()

    return run


def planted(kind: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# planted: {kind}"))


KINDS = ["print", "branch", "item", "library", "shape", "loop", "try", "hook", "function"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_break_stops_the_run_and_is_named(kind: str, fit: Make) -> None:
    report = CompileReport()
    with pytest.raises(CompileReportError) as error:
        fit(report, Net(kind), 2, 3, 2)
    text = str(error.value)
    assert f"{__file__}:{planted(kind)} in " in text
    assert f"# planted: {kind}" in text
    assert f"net.blocks.0, forward of train step {2 if kind == 'shape' else 1}, " in text
    assert "CompileReport(fail_on_graph_break=False)" in text
    section = report.report_section()  # what was known by then
    assert section is not None
    assert section["graph_breaks"] == len(section["breaks"]) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_break_is_reported(kind: str, fit: Make) -> None:
    section = fit(CompileReport(fail_on_graph_break=False), Net(kind), 2, 3, 2, 3)
    assert section["graph_breaks"] == len(section["breaks"]) > 0
    for found in section["breaks"]:
        assert (found["file"], found["line"]) == (__file__, planted(kind))
        assert found["code"].endswith(f"# planted: {kind}")
        assert f"{__file__}:{planted(kind)} in {found['function']}" in found["stack"]
        assert (found["region"], found["stage"], found["phase"]) == ("net.blocks.0", "train", "forward")
        assert found["reason"].startswith("Data-dependent branching" if kind == "branch" else "")
        assert found["reason"].strip()


def test_a_clean_model_passes(fit: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    section = fit(CompileReport(max_graphs=2, max_recompiles=1), Net("clean", fullgraph=True), 2, 3, 5, 7)
    # The second length makes the graph dynamic; the second block shares both graphs.
    assert (section["graphs"], section["recompiles"], section["graph_breaks"]) == (2, 1, 0)
    assert [(step["stage"], step["step"], step["graphs"]) for step in section["steps"]] == [
        ("train", 1, 1),
        ("train", 2, 1),
    ]
    assert [region["region"] for region in section["regions"]] == ["net.blocks.0"]
    assert (section["compiled_modules"], section["uncompiled"], section["elsewhere"]) == (2, [], [])
    assert section["compile_s"] == pytest.approx(sum(step["compile_s"] for step in section["steps"]))
    assert section["compile_s"] > 0
    table = capsys.readouterr().out
    assert re.search(r"graphs +│ 2 \(at most 2\)", table)
    assert re.search(r"graph breaks +│ 0", table)
    assert re.search(r"net\.blocks\.0 │ test_compile_report\.py:\d+ │ tensor 'x' size mismatch", table)


def test_three_recompilations_are_counted(fit: Make) -> None:
    section = fit(CompileReport(max_recompiles=3), Net("clean", dynamic=False), 2, 3, 4, 4, 5, 3)
    assert (section["graphs"], section["recompiles"], section["graph_breaks"]) == (4, 3, 0)
    assert [(again["step"], again["region"]) for again in section["recompilations"]] == [
        (2, "net.blocks.0"),
        (3, "net.blocks.0"),
        (5, "net.blocks.0"),
    ]
    for again, sizes in zip(section["recompilations"], ("2, actual 3", "3, actual 4", "4, actual 5"), strict=True):
        assert again["reason"].startswith(f"tensor 'x' size mismatch at index 0. expected {sizes}")
        assert again["code"] == "def forward(self, x: Tensor) -> Tensor:"


def test_a_recompilation_names_the_line_of_its_guard(fit: Make) -> None:
    class Repeat(Block):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = self.linear(x)
            return x

    class More(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            module.net.times = batch_idx + 1

    net = Repeat()
    net.compile(backend="eager")
    section = fit(CompileReport(), net, 2, 2, callbacks=(More(),))
    assert [again["code"] for again in section["recompilations"]] == ["for _ in range(self.times):"]
    assert section["recompilations"][0]["reason"].startswith("self.times == 1")


@pytest.mark.parametrize(
    ("limits", "said"), [({"max_recompiles": 1}, "max_recompiles is 1"), ({"max_graphs": 2}, "max_graphs is 2")]
)
def test_limits(limits: dict[str, int], said: str, fit: Make) -> None:
    report = CompileReport(**limits)
    with pytest.raises(
        CompileReportError, match=rf"made 3 graphs.*recompiled 2 times, but {said}\. What was recompiled"
    ) as error:
        fit(report, Net("clean", dynamic=False), 2, 3, 4, 5)
    assert "expected 3, actual 4" in str(error.value)
    assert "train step 3" in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("max_graphs", 0), ("max_recompiles", -1)])
def test_limits_out_of_range_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}, but"):
        CompileReport(**{name: value})  # type: ignore[arg-type]


def test_a_function_given_up_at_torchs_own_limit_is_a_break(fit: Make) -> None:
    with torch._dynamo.config.patch(recompile_limit=2):
        section = fit(CompileReport(fail_on_graph_break=False), Net("clean", dynamic=False), 2, 3, 4, 5)
    assert (section["graphs"], section["graph_breaks"]) == (2, 1)
    assert "recompile limit" in section["breaks"][0]["reason"]
    assert "expected 3, actual 4" in section["breaks"][0]["reason"]
    assert section["breaks"][0]["region"] == "net.blocks.0"
    assert section["breaks"][0]["code"] == "def forward(self, x: Tensor) -> Tensor:"


def test_torchs_own_error_of_fullgraph_is_in_the_report(trainer: Make, tmp_path: Path) -> None:
    run = trainer(CompileReport(), RunReport(tmp_path / "report.json"), enable_checkpointing=False)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run.fit(Module(Net("print", fullgraph=True)), batches(2))
    report = load_report(tmp_path / "report.json")
    (found,) = report["sections"]["compile"]["breaks"]
    assert (report["status"], found["line"]) == ("failed", planted("print"))


class Recomputed(nn.Module):
    """Breaks only while it is run again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = RunsTwice()
        self.block.compile(backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        self.block.runs = 0
        return checkpoint(self._block, x, use_reentrant=False)

    def _block(self, x: Tensor) -> Tensor:
        self.block.runs += 1
        return self.block(x)


class RunsTwice(Block):
    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.runs == 2:
            print(end="")  # planted: recomputation
        return self.linear(x).tanh()


def test_a_break_while_the_backward_recomputes(fit: Make) -> None:
    with pytest.raises(CompileReportError) as error:
        fit(CompileReport(), Recomputed(), 2)
    assert f"{__file__}:{planted('recomputation')} in forward" in str(error.value)
    assert "net.block, backward of train step 1" in str(error.value)


class CompilesInBackward(nn.Module):
    """Nothing here is a module call: the compiled function runs in the backward of a plain autograd function."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return torch.compile(_augment, backend="eager")(grad)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.Double.apply(self.linear(x))


@pytest.mark.parametrize(
    "accelerator",
    [
        "cpu",
        pytest.param(
            "gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
        ),
    ],
)
def test_a_break_in_what_the_backward_compiles(accelerator: str, fit: Make) -> None:
    """On a GPU, autograd calls it on a thread of its own, without the model on the stack."""
    with pytest.raises(CompileReportError) as error:
        fit(CompileReport(), CompilesInBackward(), 2, accelerator=accelerator, devices=1)
    assert f"{__file__}:{planted('elsewhere')} in _augment" in str(error.value)
    assert "  Module, backward of train step 1" in str(error.value)


class CompilesElsewhere(Callback):
    """Another library: has a graph, a break and a recompilation of its own between steps."""

    def on_train_batch_end(self, *_: Any) -> None:
        compiled = torch.compile(_augment, backend="eager", dynamic=False)
        compiled(torch.ones(2)), compiled(torch.ones(3))


def _augment(x: Tensor) -> Tensor:
    x = x + 1
    print(end="")  # planted: elsewhere
    return x * 2


def test_what_others_compile_is_listed_apart(fit: Make) -> None:
    section = fit(CompileReport(max_graphs=1), Net("clean"), 2, 2, callbacks=(CompilesElsewhere(),))
    assert (section["graphs"], section["graph_breaks"], section["recompiles"]) == (1, 0, 0)
    (function, rest) = section["elsewhere"]
    assert re.fullmatch(r".*test_compile_report\.py:\d+ in _augment", function["source"])
    assert (function["graphs"], function["graph_breaks"], function["recompiles"]) == (2, 2, 1)
    assert (rest["graphs"], rest["graph_breaks"]) == (2, 0)  # what followed the break


def test_what_a_data_module_compiles_is_not_the_models(trainer: Make) -> None:
    """Lightning calls its hooks through a method of the model."""

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return batches(2)

        def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            return torch.compile(_augment, backend="eager")(batch)

    report = CompileReport()
    run = trainer(report, max_steps=1, num_sanity_val_steps=0, enable_checkpointing=False)
    run.fit(Module(Net("clean")), datamodule=Data())
    section = report.report_section()
    assert section is not None
    assert (section["graphs"], section["graph_breaks"]) == (1, 0)
    assert section["elsewhere"][0]["source"].endswith(" in _augment")
    assert section["elsewhere"][0]["graph_breaks"] == 1


@pytest.mark.parametrize("fail", [True, False])
@pytest.mark.parametrize("kind", ["built-in", "replaced"])
def test_a_compiled_module_that_torch_passes_over(kind: str, fail: bool, fit: Make, recwarn: Any) -> None:
    net = nn.Sequential(Block(), nn.Linear(4, 4) if kind == "built-in" else Block())
    if kind == "replaced":
        net[1].forward = partial(checkpoint, net[1].forward, use_reentrant=False)
    net[1].compile(backend="eager")
    reason = "torch's own modules" if kind == "built-in" else "replaced on the instance"
    if fail:
        with pytest.raises(CompileReportError, match=rf"net\.1: .*{reason}"):
            fit(CompileReport(), net, 2)
    else:
        (module,) = fit(CompileReport(fail_on_graph_break=False), net, 2)["uncompiled"]
        assert module["region"] == "net.1"
        assert reason in module["reason"]
        assert any("net.1: " in str(warning.message) for warning in recwarn)


def test_a_compiled_module_that_is_never_called_is_reported_but_no_error(fit: Make) -> None:
    net = Net("clean")
    net.unused = RunsTwice()
    net.unused.compile()
    (module,) = fit(CompileReport(), net, 2)["uncompiled"]
    assert module["region"] == "net.unused"
    assert "not called" in module["reason"]


def test_a_compiled_module_inside_another_is_compiled_with_it(fit: Make) -> None:
    net = Net("clean")
    net.compile(backend="eager")
    section = fit(CompileReport(), net, 2)
    assert (section["graphs"], section["compiled_modules"], section["uncompiled"]) == (1, 3, [])
    assert section["regions"][0]["region"] == "net"


def test_torch_compile_of_a_module_and_of_a_function(fit: Make) -> None:
    class Both(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return torch.compile(torch.Tensor.square, backend="eager")(self.net(batch)).mean()

    net = torch.compile(nn.Sequential(Block("print"), nn.ReLU()), backend="eager")
    section = fit(CompileReport(fail_on_graph_break=False), net, 2)
    assert {region["region"] for region in section["regions"]} <= {"net", "net.0", "net.1"}
    # Twice: in the Sequential around it, and in the block, which torch compiles by itself then.
    assert [found["line"] for found in section["breaks"]] == [planted("print")] * 2


@pytest.mark.parametrize(("kind", "breaks"), [("clean", False), ("print", True)])
def test_a_module_compiled_whole_with_compiled_parts(kind: str, breaks: bool, trainer: Make) -> None:
    """Parts are in the graph of the whole; if that breaks in a loop, they are what has graphs."""

    class Whole(Module):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.net.blocks:
                x = block(x)
            return x

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self(batch).square().mean()

    module, report = Whole(Net(kind)), CompileReport(fail_on_graph_break=False)
    module.compile(backend="aot_eager")
    trainer(report, max_steps=1, num_sanity_val_steps=0, enable_checkpointing=False).fit(module, batches(2))
    section = report.report_section()
    assert section is not None
    assert (section["compiled_modules"], section["graph_breaks"] > 0, section["uncompiled"]) == (3, breaks, [])


def test_a_module_left_to_python_by_a_break_was_called(fit: Make) -> None:
    """And so is the second block, which has the same code."""
    section = fit(CompileReport(fail_on_graph_break=False), Net("loop"), 2)
    assert section["uncompiled"] == [
        {"region": f"net.blocks.{index}", "reason": "a graph break left its code to Python"} for index in (0, 1)
    ]


def test_a_module_that_lightning_compiles(trainer: Make) -> None:
    class Plain(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch).square().mean()

    report = CompileReport()
    run = trainer(report, max_steps=1, num_sanity_val_steps=0, enable_checkpointing=False)
    run.fit(torch.compile(Plain(Block()), backend="aot_eager"), batches(2))
    section = report.report_section()
    assert section is not None
    assert (section["compiled_modules"], section["graphs"], section["uncompiled"]) == (1, 1, [])


def test_a_model_that_compiles_nothing(fit: Make, capsys: pytest.CaptureFixture[str]) -> None:
    section = fit(CompileReport(max_graphs=1, max_recompiles=0), Block("print"), 2, 3)
    assert section["graphs"] == section["compiled_modules"] == section["compile_s"] == 0
    assert section["steps"] == section["regions"] == section["breaks"] == section["elsewhere"] == []
    assert re.search(r"graphs +│ 0", capsys.readouterr().out)


def test_it_changes_neither_losses_nor_graphs(trainer: Make) -> None:
    def run(*callbacks: Callback) -> tuple[list[Tensor], int]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        module = Module(Net("clean"))
        trainer(*callbacks, max_steps=4, enable_checkpointing=False).fit(module, batches(2, 3, 2, 3), batches(4))
        return list(module.parameters()), torch._dynamo.utils.counters["stats"]["unique_graphs"]

    (with_it, graphs), (without, graphs_without) = run(CompileReport()), run()
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert graphs == graphs_without


def test_it_takes_no_time_when_nothing_compiles(trainer: Make) -> None:
    """The four looks at a step that compiles nothing, against 1 % of a step of 40 ms; in fact some microseconds."""
    report, module = CompileReport(), Module(Net("clean"))
    report.setup(trainer(report), module, "fit")
    module.net(batches(2).dataset[0])

    def looks() -> None:
        report.on_before_backward(None, module, None)  # type: ignore[arg-type]
        report.on_after_backward(None, module)  # type: ignore[arg-type]
        report._check(module)
        report._check(module)

    looks()  # takes what the forward compiled
    assert min(timeit.repeat(looks, number=100, repeat=5)) / 100 < 400e-6
    report.teardown(trainer(), module, "fit")


def test_validation_is_a_stage_of_its_own(trainer: Make) -> None:
    report = CompileReport()
    run = trainer(report, max_steps=2, val_check_interval=2, num_sanity_val_steps=1, enable_checkpointing=False)
    run.fit(Module(Net("clean", dynamic=False)), batches(2, 2), batches(3))
    section = report.report_section()
    assert section is not None
    # The sanity check is the first to compile; training needs a graph with gradients; the validation nothing new.
    assert [(step["stage"], step["step"]) for step in section["steps"]] == [("sanity_check", 0), ("train", 1)]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_without_training(stage: str, trainer: Make) -> None:
    class Full(Module):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.net(batch)

        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch)

    def run(report: CompileReport) -> None:
        torch._dynamo.reset()
        getattr(trainer(report, enable_checkpointing=False), stage)(Full(Net("print")), batches(2))

    report = CompileReport(fail_on_graph_break=False)
    run(report)
    section = report.report_section()
    assert section is not None
    assert [(found["stage"], found["line"]) for found in section["breaks"]] == [(stage, planted("print"))]
    with pytest.raises(CompileReportError, match=f"of {stage} step 0, "):
        run(CompileReport())


def test_each_fit_starts_anew(fit: Make) -> None:
    report, net = CompileReport(), Net("clean")
    assert fit(report, net, 2, 3)["graphs"] == 2
    assert fit(report, net, 2, 3)["graphs"] == 0  # all of it is compiled already, and none is said to be missing
    assert report.report_section()["uncompiled"] == []  # type: ignore[index]
    torch._dynamo.reset()
    assert fit(report, net, 3, 2)["graphs"] == 2
    handler = torch._dynamo.callback.callback_handler
    assert (handler.start_callbacks, handler.end_callbacks) == ([], [])


def test_a_failed_fit_leaves_nothing_behind(fit: Make) -> None:
    report = CompileReport()
    with pytest.raises(CompileReportError):
        fit(report, Net("print"), 2)
    handler = torch._dynamo.callback.callback_handler
    assert (handler.start_callbacks, handler.end_callbacks) == ([], [])
    torch._dynamo.reset()
    assert fit(report, Net("clean"), 2)["graph_breaks"] == 0


def test_a_resumed_fit_counts_from_where_it_was(trainer: Make, tmp_path: Path) -> None:
    def run(max_steps: int, resume: bool) -> CompileSection:
        torch._dynamo.reset()
        report = CompileReport()
        saved = ModelCheckpoint(tmp_path, "last", save_last=False, every_n_train_steps=2)
        trainer(report, saved, max_steps=max_steps, num_sanity_val_steps=0).fit(
            Module(Net("clean", dynamic=False)),
            batches(*[2, 2, 2, 5] * 2),
            ckpt_path=tmp_path / "last.ckpt" if resume else None,
            weights_only=False,
        )
        section = report.report_section()
        assert section is not None
        return section

    assert [step["step"] for step in run(2, resume=False)["steps"]] == [1]
    resumed = run(4, resume=True)
    assert resumed["steps"][0]["step"] == 3
    assert all(2 < step["step"] <= 4 for step in resumed["steps"])


def test_accumulated_micro_batches_belong_to_one_step(trainer: Make) -> None:
    report = CompileReport()
    run = trainer(report, max_steps=2, accumulate_grad_batches=2, num_sanity_val_steps=0, enable_checkpointing=False)
    run.fit(Module(Net("clean", dynamic=False)), batches(2, 3, 4, 5))
    section = report.report_section()
    assert section is not None
    assert [(step["step"], step["graphs"]) for step in section["steps"]] == [(1, 2), (2, 2)]


def test_inductor_and_its_cache(fit: Make) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.scale = SystemRandom().random()  # a graph that no cache has; the cache itself is shared to save time

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight * self.scale

    net = Scaled()
    net.compile(backend="inductor")
    cold = fit(CompileReport(), net, 2)
    torch._dynamo.reset()
    warm = fit(CompileReport(), net, 2)
    assert (cold["graphs"], cold["cache_hits"], cold["cache_misses"]) == (1, 0, 2)  # forward and backward
    assert (warm["graphs"], warm["cache_hits"], warm["cache_misses"]) == (1, 2, 0)


def test_the_section_is_in_report_json(trainer: Make, tmp_path: Path) -> None:
    class Logs(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss)
            return loss

    report = CompileReport(fail_on_graph_break=False, max_graphs=9)
    run = trainer(RunReport(tmp_path / "report.json"), report, max_steps=2, enable_checkpointing=False)
    run.fit(Logs(Net("branch")), batches(2, 3))
    section = load_report(tmp_path / "report.json")["sections"]["compile"]
    assert section == json.loads(json.dumps(report.report_section()))
    assert section.keys() == CompileSection.__annotations__.keys()
    assert section["limits"] == {"fail_on_graph_break": False, "max_graphs": 9, "max_recompiles": None}


def test_the_example_of_the_docstring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a default trainer writes checkpoints
    text = lightning_qlora.callbacks.compile_report.__doc__ or ""
    scope: dict[str, Any] = {}
    exec(re.sub(r"(?m)^    ", "", text.partition("::\n")[2]), scope)
    data = pl.LightningDataModule.from_datasets(torch.randn(8, 4), batch_size=2)  # type: ignore[arg-type]
    scope["train"](Module(Net("clean")), data)
    assert re.search(r"^[\d.]+ s spent compiling$", capsys.readouterr().out, re.MULTILINE)


def _train_rank(directory: str, uneven: bool) -> CompileSection | None:
    torch._dynamo.reset()
    rank = torch.distributed.get_rank()
    report = CompileReport(fail_on_graph_break=False)
    trainer = pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=directory,
        callbacks=[report],
    )
    rows = (2, 3, 4) if uneven and rank == 1 else (2, 2, 2)
    trainer.fit(Module(Net("clean", dynamic=False)), batches(*rows))
    return report.report_section()


@pytest.mark.parametrize("uneven", [False, True])
def test_the_worst_rank_is_shown(uneven: bool, tmp_path: Path, ranks: RankPools) -> None:
    ((world_size, device),) = groups(2)[:1]
    sections = ranks.run(world_size, device, _train_rank, str(tmp_path), uneven)
    assert sections[0] == sections[1]
    section = sections[0]
    assert [(rank["rank"], rank["graphs"]) for rank in section["ranks"]] == [(0, 1), (1, 3 if uneven else 1)]
    assert section["graphs"] == (3 if uneven else 1)
    if uneven:
        assert (section["rank"], section["recompiles"], len(section["recompilations"])) == (1, 2, 2)
