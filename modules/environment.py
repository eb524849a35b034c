"""What is installed on this machine and whether it fits together: Python, torch, its CUDA, the driver, the GPUs.

Runs before anything is installed, so it imports nothing but Python's own library::

    python -P modules/environment.py                                  # exit status 1 if something does not fit
    python -P modules/environment.py --keep constraints.txt kept.txt  # and constraints that keep torch as it is
    pip install -e . -c kept.txt
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

Version = tuple[int, ...]

#: What torch is replaced with must fit to it, so these stay together.
KEPT = ("torch", "triton", "torchvision", "torchaudio")

OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 11)

#: By the major version of CUDA that a driver supports: the index of torch builds for it.
_INDEXES = {12: "cu128", 13: "cu130"}


@dataclass(frozen=True)
class GPU:
    """A GPU as its driver describes it.

    Attributes:
        name: E.g. ``"Tesla T4"``.
        memory: E.g. ``"15360 MiB"``; empty if unknown.
        compute_capability: ``None`` if unknown.
    """

    name: str
    memory: str = ""
    compute_capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Environment:
    """What is installed, and the GPUs.

    Attributes:
        python: Its version.
        packages: Versions of installed packages, by name.
        requirements: What torch and torchvision say they need of each other and of triton: name -> requirements.
        torch_cuda: The CUDA that torch is built for; ``None`` for a CPU build, or if there is no torch.
        torch_gpus: How many GPUs torch sees.
        torch_architectures: What torch has kernels for, e.g. ``("sm_75", "sm_80")``; empty on the CPU.
        torch_error: Why torch cannot be imported.
        torchvision_error: Why torchvision cannot, if it is installed: a build for another torch.
        driver: Version of NVIDIA's driver.
        driver_cuda: The newest CUDA that the driver supports.
        gpus: All GPUs of the machine, whatever torch sees of them.
        visible_devices: ``CUDA_VISIBLE_DEVICES``, if it is set.
    """

    python: Version
    packages: Mapping[str, str]
    requirements: Mapping[str, tuple[str, ...]]
    torch_cuda: str | None = None
    torch_gpus: int = 0
    torch_architectures: tuple[str, ...] = ()
    torch_error: str | None = None
    torchvision_error: str | None = None
    driver: str | None = None
    driver_cuda: tuple[int, int] | None = None
    gpus: tuple[GPU, ...] = ()
    visible_devices: str | None = None

    @property
    def hidden(self) -> bool:
        """Whether GPUs are hidden from torch on purpose."""
        return self.visible_devices is not None and self.visible_devices.strip() in ("", "-1", "none", "NoDevFiles")

    def report(self) -> str:
        """A line for each part."""
        installed = [f"{name} {self.packages[name]}" for name in KEPT if name in self.packages]
        lines = [f"Python {_text(self.python)}", ", ".join(installed) or "torch is not installed"]
        if "torch" in self.packages:
            lines.append("torch is built for " + (f"CUDA {self.torch_cuda}" if self.torch_cuda else "the CPU"))
        if self.driver or self.driver_cuda:
            cuda = _text(self.driver_cuda) if self.driver_cuda else "an unknown version"
            lines.append(f"driver {self.driver or 'of unknown version'}, supports CUDA up to {cuda}")
        for index, gpu in enumerate(self.gpus):
            capability = f", compute capability {_text(gpu.compute_capability)}" if gpu.compute_capability else ""
            lines.append(f"GPU {index}: {gpu.name}{f', {gpu.memory}' if gpu.memory else ''}{capability}")
        seen = f"torch sees {self.torch_gpus} of them" if self.torch_error is None else "torch cannot be imported"
        if self.hidden:
            seen += f", because CUDA_VISIBLE_DEVICES={self.visible_devices!r} hides them"
        lines.append(seen if self.gpus else "no NVIDIA GPU")
        return "\n".join(lines)

    def problems(self) -> list[str]:
        """What does not fit, each with its remedy."""
        found = []
        if self.python < OLDEST_PYTHON:
            found.append(
                f"Python {_text(self.python)} is too old. Make an environment with {_text(OLDEST_PYTHON)} or newer."
            )
        torch = self.packages.get("torch")
        if torch is not None and parse_version(torch) < OLDEST_TORCH:
            found.append(
                f"torch {torch} is older than {_text(OLDEST_TORCH)}, the oldest that is supported. {self._install()}"
            )
        for name, requirements in self.requirements.items():
            for package, version in _pins(requirements):
                have = self.packages.get(package)
                if have is not None and have.partition("+")[0] != version.partition("+")[0]:
                    found.append(_misfit(name, self.packages[name], package, have, version))
        if self.torchvision_error is not None and not any(problem.startswith("torchvision") for problem in found):
            found.append(
                f"torchvision {self.packages.get('torchvision')} cannot be imported, so imports of transformers fail: "
                f"{self.torchvision_error}. It is built for another torch. Remedy: pip uninstall -y torchvision, which "
                f"is not needed here, or install the build for torch {torch}."
            )
        if self.torch_error is not None:
            found.append(f"torch cannot be imported: {self.torch_error}. {self._install()}")
        elif torch is not None and (problem := self.no_gpu_seen()):
            found.append(problem)
        elif torch is None and self.gpus and self.driver_cuda and self.driver_cuda[0] < max(_INDEXES):
            found.append(f"torch is not installed, and its newest builds need a newer driver. {self._install()}")
        for index, gpu in enumerate(self.gpus if self.torch_gpus else ()):
            if gpu.compute_capability and not _has_kernels(self.torch_architectures, gpu.compute_capability):
                found.append(
                    f"torch {torch} has no kernels for GPU {index}, a {gpu.name} of compute capability "
                    f"{_text(gpu.compute_capability)}: it has {' '.join(self.torch_architectures)}. Use another GPU."
                )
        return found

    def no_gpu_seen(self) -> str | None:
        """Why torch sees none of the GPUs that are there, and what to do; ``None`` if it sees some, or hides them."""
        if not self.gpus or self.torch_gpus or self.hidden:
            return None
        names = {gpu.name: sum(other.name == gpu.name for other in self.gpus) for gpu in self.gpus}
        there = ", ".join(f"{count} x {name}" for name, count in names.items())
        torch = f"torch {self.packages.get('torch')}"
        if self.torch_cuda is None:
            why = f"{torch} is built for the CPU. {self._install()}"
        elif self.driver_cuda and int(self.torch_cuda.split(".")[0]) > self.driver_cuda[0]:
            why = (
                f"{torch} is built for CUDA {self.torch_cuda}, but the driver ({self.driver or 'version unknown'}) "
                f"supports CUDA up to {_text(self.driver_cuda)}. {self._install()}"
            )
        elif self.visible_devices is not None:
            why = f"CUDA_VISIBLE_DEVICES={self.visible_devices!r} names none of them. Correct or unset it."
        else:
            why = (
                f'{torch} and the driver ({self.driver or "version unknown"}) should fit. `python -c "import torch; '
                'torch.cuda.init()"` says more; a container needs --gpus all, a driver that was updated a restart.'
            )
        return (
            f"This machine has GPUs ({there}), but torch sees none: {why} To use the CPU, set CUDA_VISIBLE_DEVICES=''."
        )

    def _install(self) -> str:
        if not self.gpus:
            return "Install a newer one: pip install -U torch."
        major = min(self.driver_cuda[0] if self.driver_cuda else max(_INDEXES), max(_INDEXES))
        if major not in _INDEXES:
            return "Update the driver to 580 or newer."
        newer = ", or update the driver to 580 or newer" if major < max(_INDEXES) else ""
        return (
            f"Install a build for this driver: pip install --force-reinstall 'torch>={_text(OLDEST_TORCH)}' "
            f"--index-url https://download.pytorch.org/whl/{_INDEXES[major]}{newer}."
        )


def parse_version(text: str) -> Version:
    """``"2.11.0+cu128"`` -> ``(2, 11, 0)``."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def _text(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


def _pins(requirements: Iterable[str]) -> list[tuple[str, str]]:
    """Which of :data:`KEPT` exact versions are required of."""
    pattern = rf"({'|'.join(KEPT)})\s*\(?==\s*([\w.+]+)"
    return [(match[1], match[2]) for each in requirements if (match := re.match(pattern, each))]


def _misfit(name: str, version: str, package: str, have: str, wanted: str) -> str:
    remedy = f"pip install {package}=={wanted}"
    if package == "torch":
        remedy = f"pip uninstall -y {name}, which is not needed here, or install the one for torch {have}"
    return (
        f"{name} {version} needs {package} {wanted}, but {have} is installed, so imports of transformers may fail. "
        f"Remedy: {remedy}."
    )


def _has_kernels(architectures: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether code for one of ``architectures`` runs on a GPU: of the same major version, or as PTX on a newer one."""
    for architecture in architectures:
        if match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture):
            major, minor = int(match[2]), int(match[3])
            if (major, minor) <= capability and (match[1] == "compute" or major == capability[0]):
                return True
    return not list(architectures)


def environment() -> Environment:
    """Describe this machine."""
    packages = {
        _normal(each.metadata["Name"]): each.version for each in metadata.distributions() if each.metadata["Name"]
    }
    requirements = {name: tuple(metadata.requires(name) or ()) for name in KEPT if name in packages}
    driver, gpus = gpus_of_driver()
    cuda, seen, architectures, error = _torch() if "torch" in packages else (None, 0, (), None)
    return Environment(
        sys.version_info[:3], packages, requirements, cuda, seen, architectures, error,
        _torchvision_error() if "torchvision" in packages and error is None else None, driver, _driver_cuda(), gpus,
        os.environ.get("CUDA_VISIBLE_DEVICES"),
    )  # fmt: skip


def _torch() -> tuple[str | None, int, tuple[str, ...], str | None]:
    """torch's CUDA, how many GPUs it sees, what it has kernels for, and why it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return None, 0, (), f"{type(error).__name__}: {error}"
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.version.cuda, seen, tuple(torch.cuda.get_arch_list()) if seen else (), None


def _torchvision_error() -> str | None:
    """Why torchvision, which transformers imports where it is installed, cannot be imported."""
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # it registers operators, which fails in its own ways
        return f"{type(error).__name__}: {error}"
    return None


def gpus_of_driver() -> tuple[str | None, tuple[GPU, ...]]:
    """The driver's version, and the GPUs that it knows: from nvidia-smi, or else from the driver's own files."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total,compute_cap", "--format=csv,noheader"]
        try:
            result = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            result = None
        if result is not None and result.returncode == 0 and result.stdout.strip():
            rows = [[part.strip() for part in line.split(",")] for line in result.stdout.strip().splitlines()]
            gpus = [
                GPU(
                    name,
                    memory,
                    (int(match[1]), int(match[2])) if (match := re.fullmatch(r"(\d+)\.(\d+)", cap)) else None,
                )
                for _, name, memory, cap in rows
            ]
            return rows[0][0], tuple(gpus)
    models = [file.read_text() for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    found = tuple(GPU(match[1].strip()) for text in models if (match := re.search(r"Model:(.*)", text)))
    version = Path("/proc/driver/nvidia/version")
    match = re.search(r"Kernel Module\D*([\d.]+)", version.read_text()) if version.is_file() else None
    return (match[1] if match else None), found


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver supports; asking it makes no CUDA context."""
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
            return version.value // 1000, version.value % 1000 // 10
    except (OSError, AttributeError):
        pass
    return None


def keep_installed(constraints: str, project: str, installed: Mapping[str, str]) -> str:
    """``constraints`` that leave alone what is there: torch and what belongs to it exactly, others if new enough.

    Args:
        constraints: Lines ``name==version`` of a constraints file.
        project: The text of ``pyproject.toml``, whose dependencies say what is new enough.
        installed: Versions by normalized name.
    """
    needs = tomllib.loads(project)["project"]["dependencies"]
    matches = [match for each in needs if (match := re.match(r"([\w.-]+).*?>=([\d.]+)", each))]
    least = {_normal(match[1]): parse_version(match[2]) for match in matches}
    supported = {name for name, version in installed.items() if parse_version(version) >= least.get(name, ())}
    kept = [f"{name}=={installed[name]}" for name in KEPT if name in supported]
    rest = [line for line in constraints.splitlines() if _normal(line.partition("==")[0]) not in supported]
    return "\n".join([*rest, *kept]) + "\n"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(arguments: list[str] | None = None) -> int:
    """Print the report; returns 1 if something does not fit, else 0."""
    parser = argparse.ArgumentParser(
        description="Python, torch, its CUDA, the driver's, the GPUs, and whether they fit together."
    )
    parser.add_argument(
        "--keep", nargs=2, metavar=("CONSTRAINTS", "OUTPUT"), type=Path,
        help="Also write pip constraints to OUTPUT: those of CONSTRAINTS, but torch and triton stay as they are, like "
        "other installed packages that are new enough.",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    here = environment()
    print(f"{platform.platform()}\n{here.report()}", flush=True)
    if options.keep:
        constraints, output = options.keep
        project = constraints.with_name("pyproject.toml").read_text()
        output.write_text(keep_installed(constraints.read_text(), project, here.packages))
    problems = here.problems()
    for problem in problems:
        print(f"error: {problem}", flush=True)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
