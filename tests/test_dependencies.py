"""What pyproject.toml declares is imported, and what is imported is declared."""

import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions

from tests.import_graph import FILES, ROOT, imports, own_file

# Installed by hand to compare with, in benchmarks only.
PEERS = {"accelerate", "cut-cross-entropy", "liger-kernel", "trl"}

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {normalized(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in requirements}


EXTRAS = {extra: names(requirements) for extra, requirements in _PROJECT["optional-dependencies"].items()}
DECLARED = names(_PROJECT["dependencies"]).union(*(EXTRAS[extra] for extra in EXTRAS.keys() - {"dev"}))


@cache
def imported() -> dict[str, str]:
    """Distribution of each third-party package that our files import, and one file that does."""
    distributions = packages_distributions()
    found = {}
    for file in FILES:
        for module, name in imports(file):
            top = module.partition(".")[0]
            if top in sys.stdlib_module_names or own_file(file, module, name) is not None:
                continue
            # Of what is not installed, such as xformers, the distribution is taken to have the package's name.
            for distribution in distributions.get(top, [top]):
                found[normalized(distribution)] = file
    return found


def test_what_is_imported_is_declared() -> None:
    undeclared = {name: file for name, file in imported().items() if name not in DECLARED}
    assert {name for name, file in undeclared.items() if file.startswith("recipes.benchmarks.")} <= PEERS
    assert not {name: file for name, file in undeclared.items() if not file.startswith("recipes.benchmarks.")}


def test_what_is_declared_is_imported() -> None:
    assert not DECLARED - imported().keys()


def test_ci_pins_what_is_declared() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    # xformers needs a GPU's build of torch, so CI does not install it.
    assert (DECLARED | EXTRAS["dev"]) - names(pins) == EXTRAS["xformers"]
