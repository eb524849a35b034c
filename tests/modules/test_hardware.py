"""What is answered for hardware that is not here: a T4, an A100, several of them, none."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from lightning_qlora.modules import hardware
from lightning_qlora.modules.hardware import (
    Capabilities,
    capabilities,
    check_devices,
    check_precision,
    compute_dtype,
    default_precision,
)

T4, A100 = ("Tesla T4", 7, 5), ("NVIDIA A100", 8, 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``machine(T4, T4, cores=4)`` pretends that these are the GPUs and cores of this machine."""

    def pretend(*gpus: tuple[str, int, int], cores: int = 8) -> None:
        properties = [SimpleNamespace(name=n, major=a, minor=b, total_memory=15 * 2**30) for n, a, b in gpus]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
        # What torch says of a T4 too, by emulation, and so must not be asked.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        monkeypatch.setattr("os.cpu_count", lambda: cores)
        monkeypatch.setattr(hardware, "gpus_of_driver", lambda: (None, ()))

    return pretend


@pytest.mark.parametrize(
    ("gpus", "expected", "precision"),
    [
        ([T4], Capabilities("cuda", "Tesla T4", (7, 5), 15 * 2**30, False), "16-mixed"),
        ([A100], Capabilities("cuda", "NVIDIA A100", (8, 0), 15 * 2**30, True), "bf16-mixed"),
        ([A100, T4], Capabilities("cuda", "NVIDIA A100", (8, 0), 15 * 2**30, True), "16-mixed"),
        ([("NVIDIA H200", 9, 0)], Capabilities("cuda", "NVIDIA H200", (9, 0), 15 * 2**30, True), "bf16-mixed"),
    ],
)
def test_bf16_goes_by_the_compute_capability(machine, gpus, expected, precision):
    machine(*gpus)
    assert capabilities() == expected
    assert default_precision() == precision
    assert check_precision("auto") == check_precision(precision) == precision


def test_a_cpu_computes_in_float32_by_default(machine):
    machine()
    here = capabilities()
    assert (here.device_type, here.compute_capability, here.bf16) == ("cpu", None, True)
    assert 2**27 < here.memory_bytes < 2**50
    assert default_precision() == "32-true"
    assert check_precision("bf16-mixed") == "bf16-mixed"


@pytest.mark.parametrize("gpus", [[T4], [A100, T4]])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_is_refused_where_one_gpu_lacks_it(machine, gpus, precision):
    machine(*gpus)
    message = (
        rf"precision='{precision}' needs .*device {len(gpus) - 1} is a Tesla T4 with 7.5. Use precision='16-mixed'"
    )
    with pytest.raises(ValueError, match=message):
        check_precision(precision)
    assert check_precision("16-mixed") == "16-mixed"


@pytest.mark.parametrize("precision", ["16", "fp16", "", "16-true"])
def test_an_unknown_precision_is_refused_with_the_known_ones(precision):
    with pytest.raises(
        ValueError, match=f"Unknown precision '{precision}'. Choose auto or one of 32-true, 16-mixed, bf16-mixed"
    ):
        check_precision(precision)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("16-mixed", torch.float16),
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
    ],
)
def test_the_compute_dtype_of_a_precision(precision, dtype):
    assert compute_dtype(precision) == dtype


@pytest.mark.parametrize(("gpus", "cores", "most"), [([T4, T4], 64, 2), ([], 2, 4), ([], 16, 16)])
def test_devices_are_those_there_are(machine, gpus, cores, most):
    machine(*gpus, cores=cores)
    assert check_devices(1) == 1
    assert check_devices(most) == most
    with pytest.raises(ValueError, match=f"devices={most + 1} .*{'2 CUDA device' if gpus else f'{cores} CPU core'}"):
        check_devices(most + 1)
    for devices in (0, -1):
        with pytest.raises(ValueError, match=f"devices must be at least 1, got {devices}"):
            check_devices(devices)


def test_several_machines_need_a_launcher(monkeypatch):
    for name in ("GROUP_RANK", "NODE_RANK", "SLURM_PROCID", "LSB_JOBID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ValueError, match=r"num_nodes=2 but nothing says which .* torchrun --nnodes=2 --nproc_per_node=1"
    ):
        check_devices(1, num_nodes=2)
    monkeypatch.setenv("GROUP_RANK", "0")  # as torchrun does
    assert check_devices(1, num_nodes=2) == 1
