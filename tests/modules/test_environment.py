"""What is said of other machines: a driver too old for torch, a CPU build beside GPUs, another torchvision."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_qlora.modules import environment as environment_module
from lightning_qlora.modules import hardware
from lightning_qlora.modules.environment import GPU, Environment, environment, keep_installed, main

ROOT = Path(__file__).resolve().parents[2]
T4 = GPU("Tesla T4", "15360 MiB", (7, 5))

#: Kaggle's GPU image as of August 2026.
KAGGLE = Environment(
    python=(3, 12, 11),
    packages={"torch": "2.11.0+cu128", "triton": "3.6.0", "torchvision": "0.26.0+cu128", "numpy": "2.0.2"},
    requirements={"torch": ("triton==3.6.0; platform_system == 'Linux'",), "torchvision": ("torch==2.11.0", "numpy")},
    torch_cuda="12.8",
    torch_gpus=2,
    torch_architectures=("sm_75", "sm_80", "sm_90", "compute_120"),
    driver="570.172",
    driver_cuda=(12, 8),
    gpus=(T4, T4),
)
NEWER_TORCH = {**KAGGLE.packages, "torch": "2.13.0+cu130", "triton": "3.9.0"}
REPLACED = replace(  # what `pip install -c constraints.txt` made of it
    KAGGLE, packages=NEWER_TORCH, torch_cuda="13.0", torch_gpus=0, torch_architectures=(),
    requirements={"torch": ("triton==3.9.0",), "torchvision": ("torch==2.11.0",)},
)  # fmt: skip


def test_what_fits_is_reported_without_a_problem():
    assert KAGGLE.problems() == []
    assert KAGGLE.report().splitlines() == [
        "Python 3.12.11",
        "torch 2.11.0+cu128, triton 3.6.0, torchvision 0.26.0+cu128",
        "torch is built for CUDA 12.8",
        "driver 570.172, supports CUDA up to 12.8",
        "GPU 0: Tesla T4, 15360 MiB, compute capability 7.5",
        "GPU 1: Tesla T4, 15360 MiB, compute capability 7.5",
        "torch sees 2 of them",
    ]
    cpu = Environment((3, 11, 7), {"torch": "2.13.0+cpu"}, {"torch": ()})
    assert cpu.problems() == []
    assert cpu.report().endswith("torch is built for the CPU\nno NVIDIA GPU")


CPU_BUILD = replace(REPLACED, packages={"torch": "2.13.0+cpu"}, requirements={}, torch_cuda=None)


@pytest.mark.parametrize(
    ("here", "problem"),
    [
        (replace(REPLACED, requirements={}),
         "This machine has GPUs (2 x Tesla T4), but torch sees none: torch 2.13.0+cu130 is built for CUDA 13.0, but "
         "the driver (570.172) supports CUDA up to 12.8. Install a build for this driver: pip install --force-reinst"
         "all 'torch>=2.11' --index-url https://download.pytorch.org/whl/cu128, or update the driver to 580 or newer. T"
         "o use the CPU, set CUDA_VISIBLE_DEVICES=''."),
        (CPU_BUILD,
         "This machine has GPUs (2 x Tesla T4), but torch sees none: torch 2.13.0+cpu is built for the CPU. Install a "
         "build for this driver: pip install --force-reinstall 'torch>=2.11' --index-url "
         "https://download.pytorch.org/whl/cu128, or update the driver to 580 or newer. To use the CPU, set "
         "CUDA_VISIBLE_DEVICES=''."),
        (replace(CPU_BUILD, driver_cuda=(13, 1)), "https://download.pytorch.org/whl/cu130. To use"),
        (replace(CPU_BUILD, driver_cuda=(11, 4)), "Update the driver to 580 or newer."),
        (replace(KAGGLE, torch_gpus=0, visible_devices="7"), "CUDA_VISIBLE_DEVICES='7' names none of them. Correct or"),
        (replace(KAGGLE, torch_gpus=0), "should fit. `python -c \"import torch; torch.cuda.init()\"` says more"),
        (replace(KAGGLE, packages={**KAGGLE.packages, "torchvision": "0.28.0"},
                 requirements={"torchvision": ("torch (==2.13.0)",)}),
         "torchvision 0.28.0 needs torch 2.13.0, but 2.11.0+cu128 is installed, so imports of transformers may fail. "
         "Remedy: pip uninstall -y torchvision, which is not needed here, or install the one for torch 2.11.0+cu128."),
        (replace(KAGGLE, torchvision_error="RuntimeError: operator torchvision::nms does not exist"),
         "torchvision 0.26.0+cu128 cannot be imported, so imports of transformers fail: RuntimeError: operator "
         "torchvision::nms does not exist. It is built for another torch. Remedy: pip uninstall -y torchvision, "),
        (replace(KAGGLE, packages={**KAGGLE.packages, "triton": "3.9.0"}),
         "torch 2.11.0+cu128 needs triton 3.6.0, but 3.9.0 is installed, so imports of transformers may fail. Remedy: "
         "pip install triton==3.6.0."),
        (replace(KAGGLE, packages={"torch": "2.9.1"}, requirements={}),
         "torch 2.9.1 is older than 2.11, the oldest that is supported. Install a build for this driver: pip install"),
        (replace(KAGGLE, python=(3, 10, 4)), "Python 3.10.4 is too old. Make an environment with 3.11 or newer."),
        (replace(KAGGLE, packages={}, requirements={}, torch_gpus=0), "torch is not installed, and its newest bui"),
        (replace(KAGGLE, torch_error="OSError: libcudart.so.12", torch_gpus=0),
         "torch cannot be imported: OSError: libcudart.so.12. Install a build for this driver"),
        (replace(KAGGLE, gpus=(GPU("Tesla P100", "", (6, 0)),)),
         "torch 2.11.0+cu128 has no kernels for GPU 0, a Tesla P100 of compute capability 6.0: it has sm_75 sm_80"),
    ],
)  # fmt: skip
def test_each_misfit_is_named_with_its_remedy(here, problem):
    (found,) = here.problems()
    assert problem in found


def test_a_torchvision_that_fails_is_found_by_importing_it(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    assert environment_module._torchvision_error() == "RuntimeError: operator nms does not exist"


def test_a_replaced_torch_has_all_its_problems_named():
    assert [problem.split(" ")[0] for problem in REPLACED.problems()] == ["torchvision", "This"]


def test_gpus_may_be_hidden_and_newer_ones_run_older_code():
    for hidden in ("", "-1"):
        here = replace(REPLACED, requirements={}, visible_devices=hidden)
        assert here.problems() == []
        assert here.report().endswith(f"torch sees 0 of them, because CUDA_VISIBLE_DEVICES={hidden!r} hides them")
    for capability in ((8, 9), (12, 0), (13, 0)):  # sm_80 of the same major version, PTX, PTX
        assert replace(KAGGLE, gpus=(GPU("new", "", capability),)).problems() == []


@pytest.fixture
def gpus_here(tmp_path, monkeypatch) -> None:
    """An nvidia-smi that lists two T4s, which torch does not see."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nfor i in 0 1; do echo '570.172.08, Tesla T4, 15360 MiB, 7.5'; done\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(environment_module, "_driver_cuda", lambda: (12, 8))


@pytest.mark.usefixtures("gpus_here")
def test_a_run_on_a_machine_with_gpus_that_torch_does_not_see_is_refused(monkeypatch, capsys):
    message = (
        r"^This machine has GPUs \(2 x Tesla T4\), but torch sees none: torch .* To use the CPU, set CUDA_VISIBLE_DEV"
    )
    with pytest.raises(ValueError, match=message):
        hardware.check_devices(1)
    assert environment().gpus == (T4, T4)
    assert environment().driver == "570.172.08"
    assert main([]) == 1
    assert "error: This machine has GPUs (2 x Tesla T4)" in capsys.readouterr().out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.check_devices(1) == 1
    assert main([]) == 0


CONSTRAINTS = (
    "# tested\nJinja2==3.1.6\nnumpy==2.4.6\npeft==0.21.2\ntorch==2.13.0\ntransformers==5.23.0\ntriton==3.9.0\n"
)
PROJECT = """[project]
dependencies = ["torch>=2.11", "triton>=3.6; platform_system == 'Linux'", "transformers>=5.17", "jinja2>=3.1",
    "numpy>=2.0", "peft>=0.21", "jsonargparse[signatures]>=4.50"]
"""


def test_the_torch_that_is_there_stays_with_all_else_that_is_new_enough():
    installed = {**KAGGLE.packages, "transformers": "5.10.0", "jinja2": "3.1.2"}
    assert keep_installed(CONSTRAINTS, PROJECT, installed).splitlines() == [
        "# tested", "peft==0.21.2", "transformers==5.23.0",  # missing, and too old
        "torch==2.11.0+cu128", "triton==3.6.0", "torchvision==0.26.0+cu128",
    ]  # fmt: skip
    assert keep_installed(CONSTRAINTS, PROJECT, {}) == CONSTRAINTS
    assert "torch==2.13.0" in keep_installed(CONSTRAINTS, PROJECT, {"torch": "2.10.0"}).splitlines()


def test_the_report_needs_nothing_installed(tmp_path):
    """Of the file alone, by a Python without packages."""
    command = [sys.executable, "-I", "-S", str(ROOT / "modules" / "environment.py")]
    kept = tmp_path / "kept.txt"
    result = subprocess.run(
        [*command, "--keep", str(ROOT / "constraints.txt"), str(kept)], capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert "torch is not installed" in result.stdout
    assert kept.read_text() == (ROOT / "constraints.txt").read_text()
