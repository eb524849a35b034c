"""The names that packages export: they are there, and importing a package does not import what they need."""

import json
import subprocess
import sys
from importlib import import_module

import pytest

from tests.import_graph import FILES, imports

PACKAGES = sorted(name for name, path in FILES.items() if path.name == "__init__.py")
LAZY = [package for package in PACKAGES if ("modules.lazy", "import_on_first_use") in imports(package)]

THIRD_PARTY = """
import json, sys
before = set(sys.modules)
{statement}
names = {{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names
print(json.dumps(sorted(names)))
"""


def third_party_after(statement: str) -> set[str]:
    """Top-level packages that a new interpreter has imported after ``statement``."""
    code = THIRD_PARTY.format(statement=statement)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return set(json.loads(run.stdout.splitlines()[-1])) - {"lightning_qlora"}


def test_users_find_what_they_type_in_modules() -> None:
    from lightning_qlora import modules

    assert {
        "ChatDataModule", "FSDP2Strategy", "NF4Linear", "QLoRACausalLM", "build_strategy", "cross_entropy",
        "default_lora", "linear_loss", "losses", "merge_adapter", "quantize_linears", "resolve_model", "save_adapter",
    } <= set(modules.__all__)  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_there(package: str) -> None:
    module = import_module(f"lightning_qlora.{package}")
    for name in getattr(module, "__all__", []):
        value = getattr(module, name)
        assert getattr(module, name) is value
        assert name in dir(module)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("package", LAZY)
def test_what_editors_see_is_what_is_exported(package: str) -> None:
    exporter = import_module(f"lightning_qlora.{package}")
    seen = {name: module for module, name in imports(package) if module not in ("typing", "modules.lazy")}
    assert sorted(seen) == sorted(exporter.__all__)
    for name, module in seen.items():
        assert getattr(exporter, name) is getattr(import_module(f"lightning_qlora.{module}"), name)
    # A file of that name would take the name's place in the package as soon as anything imports the file.
    assert not [name for name in seen if FILES.get(f"{package}.{name}", FILES[package]).name != "__init__.py"]


@pytest.mark.parametrize("package", LAZY)
def test_importing_a_package_imports_nothing_that_takes_time(package: str) -> None:
    """The bound is the time of transformers, peft and Lightning; on a busy machine only what is imported is certain."""
    assert third_party_after(f"import lightning_qlora.{package}") == set()


def test_the_embedded_data_need_no_training_libraries() -> None:
    imported = third_party_after("from lightning_qlora.modules.data.stdlib_docs import stdlib_api_cards")
    assert "torch" in imported
    assert not imported & {"transformers", "peft", "lightning", "datasets", "bitsandbytes"}
