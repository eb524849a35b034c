"""What torch's records say of compilations, name by name and event by event, without a trainer."""

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_qlora.callbacks import dynamo
from lightning_qlora.callbacks.dynamo import Compilation, CompileLog, compiled_modules, has_compiled_code, why_skipped


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.first.compile(backend="aot_eager")
        self.second.compile(backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def loss(self, x: Tensor) -> Tensor:
        return torch.compile(_square, backend="eager")(self(x)).sum()

    def scaled(self, x: Tensor) -> Tensor:
        return 2 * x


def _square(x: Tensor) -> Tensor:
    return x * x


def example(*shape: int) -> Tensor:
    return torch.randn(*shape or (3, 4), requires_grad=True)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def log(model: Model) -> Iterator[CompileLog[str]]:
    log = CompileLog(model, lambda: "now")
    log.start()
    yield log
    log.stop()


def regions(compilations: list[Compilation[Any]]) -> list[tuple[str | None, bool]]:
    return [(item.region, item.has_graph) for item in compilations]


@pytest.mark.parametrize("name", dynamo._NAMES)
def test_torch_has_the_private_name(name: str) -> None:
    module, attribute = dynamo._NAMES[name]
    assert hasattr(dynamo._internals(), name), f"{module}.{attribute} moved"


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name in dynamo._FIELDS for field in sorted(dynamo._FIELDS[name])]
)
def test_torch_has_the_private_field(name: str, field: str) -> None:
    fields = getattr(dynamo._internals(), name).__dataclass_fields__
    assert field in fields, f"{'.'.join(dynamo._NAMES[name])}.{field} moved"


def test_a_missing_name_is_named(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setitem(dynamo._NAMES, "rows", ("torch._dynamo.utils", "get_compilation_rows"))
    with pytest.raises(RuntimeError, match=r"has no torch\._dynamo\.utils\.get_compilation_rows, which"):
        CompileLog(model, lambda: None).start()


def test_a_missing_field_is_named(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setitem(dynamo._FIELDS, "row_type", {"recompile_cause"})
    with pytest.raises(RuntimeError, match=r"has no torch\._dynamo\.utils\.CompilationMetrics\.recompile_cause, which"):
        CompileLog(model, lambda: None).start()


def test_forward_and_backward_of_equal_modules(model: Model, log: CompileLog[str]) -> None:
    model(example()).sum().backward()
    first, *backwards = log.take()
    assert (first.region, first.has_graph, first.in_backward) == ("first", True, False)
    assert (first.function.function, first.function.code) == ("forward", "def forward(self, x: Tensor) -> Tensor:")
    assert first.function.file == __file__
    assert (first.breaks, first.recompile_reason, first.where) == ((), None, "now")
    assert first.seconds > 0
    # The second block shares the first one's code; the backward was traced with the forward and is no graph of its own.
    assert regions(backwards) == [("first", False)]
    assert backwards[0].in_backward
    assert log.take() == []
    model(example()).sum().backward()
    assert log.take() == []


def test_functions_called_by_the_root_are_its_own_and_others_are_not(model: Model, log: CompileLog[str]) -> None:
    model.loss(example())
    elsewhere = torch.compile(lambda x: x + 1, backend="eager")
    elsewhere(example())
    Model()(example(2, 2, 4))  # an equal model, but not this one
    assert regions(log.take()) == [("first", True), ("", True), (None, True), (None, True)]


def test_a_compiled_method_of_the_root_is_its_own(log: CompileLog[str], model: Model) -> None:
    torch.compile(model.scaled, backend="eager")(example())
    assert regions(log.take()) == [("", True)]


def test_reset_in_between_is_survived(model: Model, log: CompileLog[str]) -> None:
    model(example())
    torch._dynamo.reset()
    assert [item.region for item in log.take()] == ["first"]
    model(example())
    assert [item.region for item in log.take()] == ["first"]


@pytest.fixture
def _few_rows() -> Iterator[None]:
    torch._dynamo.utils.set_compilation_metrics_limit(4)
    yield
    torch._dynamo.utils.set_compilation_metrics_limit(torch._dynamo.utils.DEFAULT_COMPILATION_METRICS_LIMIT)


@pytest.mark.usefixtures("_few_rows")
def test_more_compilations_than_torch_keeps_rows_of(log: CompileLog[str]) -> None:
    for number in range(7):
        torch.compile(eval(f"lambda x: x + {number}"), backend="eager")(example())
    assert len(log.take()) == 7


def test_a_backward_on_another_thread(model: Model, log: CompileLog[str]) -> None:
    loss = model(example()).sum()
    log.in_backward = True
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    other = threading.Thread(target=torch.compile(_square, backend="eager"), args=(example(),))
    other.start()
    other.join()
    log.in_backward = False
    assert [(item.region, item.in_backward) for item in log.take()] == [("first", False), ("first", True), ("", True)]


def test_nothing_is_left_behind(model: Model) -> None:
    handler = torch._dynamo.callback.callback_handler
    before = list(handler.start_callbacks), list(handler.end_callbacks)
    log = CompileLog(model, lambda: None)
    log.start()
    log.stop()
    log.stop()
    assert (handler.start_callbacks, handler.end_callbacks) == before
    model(example())
    assert log.take() == []


def test_what_was_compiled_before_the_start_is_not_in_it(model: Model) -> None:
    model(example())
    log = CompileLog(model, lambda: None)
    log.start()
    model(example(5, 4))
    log.stop()
    assert [item.recompile_reason is None for item in log.take()] == [False]


def test_compiled_modules_by_name() -> None:
    root = nn.ModuleDict({"plain": Block(), "in_place": Block(), "wrapped": torch.compile(Block())})
    root["in_place"].compile()
    assert list(compiled_modules(root)) == ["in_place", "wrapped"]
    assert type(compiled_modules(root)["wrapped"]) is Block


def test_has_compiled_code(model: Model) -> None:
    assert not has_compiled_code(model)
    model(example())
    assert has_compiled_code(model.first)
    assert not has_compiled_code(model)  # only its parts were compiled
    assert has_compiled_code(nn.Sequential(model.first))  # whose own forward never is


def test_modules_that_torch_compile_passes_over() -> None:
    """The reasons stated are real: if torch starts to compile one of these, its reason goes."""
    built_in, replaced, mine = nn.Linear(4, 4), Block(), Block()
    replaced.forward = partial(checkpoint, replaced.forward, use_reentrant=False)
    for module in (built_in, replaced, mine):
        module.compile(backend="eager")
        module(example())
    assert "torch's own modules" in str(why_skipped(built_in))
    assert not has_compiled_code(built_in)
    assert "replaced on the instance" in str(why_skipped(replaced))
    assert why_skipped(mine) is None
    assert has_compiled_code(mine)
