"""The example of the package's docstring, as another project would run it."""

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_qlora.callbacks
from lightning_qlora.callbacks import (
    CompileReport,
    LossProgress,
    MemoryReport,
    RunReport,
    ThroughputReport,
    load_report,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.embed(ids)).flatten(0, 1), ids.flatten())


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.net.compile(fullgraph=True, backend="aot_eager")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch["input_ids"])
        self.log("train_loss", loss, batch_size=2)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.filterwarnings("ignore")
def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    example = inspect.cleandoc((lightning_qlora.callbacks.__doc__ or "").split("::\n")[1].partition("\n\nTokens")[0])
    assert len([line for line in example.splitlines() if line]) <= 10
    scope: dict[str, Any] = {}
    exec(example, scope)
    rows = [{"input_ids": torch.arange(5) + i} for i in range(6)]
    scope["train"](Module(), DataLoader(rows, batch_size=2))  # type: ignore[arg-type]
    report = load_report("run/report.json")
    assert report["losses"][0] > report["losses"][-1]
    assert len(report["losses"]) == 100
    assert report["tokens_per_s"] > 0
    assert report["sections"].keys() == {"compile", "memory", "throughput"}
    assert report["sections"]["compile"]["graphs"] == 1
    assert Path("run/report.html").is_file()
    printed = capsys.readouterr().out
    assert "1 graphs" in printed.splitlines()
    assert all(title in printed for title in ("torch.compile", "Memory in GiB", "Throughput"))


@pytest.mark.parametrize("make", [CompileReport, MemoryReport, ThroughputReport, RunReport, LossProgress])
def test_a_report_can_be_sent_to_a_spawned_process(make: Any) -> None:
    report = make("report.json") if make is RunReport else make()
    assert type(pickle.loads(pickle.dumps(report))) is type(copy.deepcopy(report)) is make
