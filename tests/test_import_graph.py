"""Who may import whom: the rooms of `modules/` lie on floors and imports go down. CONTRIBUTING.md says it in words."""

from graphlib import TopologicalSorter

import pytest

from tests.import_graph import FILES, imports, own_file

# A room imports from lower floors only. `modules` is the `__init__` with the names that users type.
FLOORS = (
    {"modules"},
    {"training", "export"},
    {"models"},
    {"distributed", "lora", "checkpoints"},
    {"attention", "quantization"},
    {"losses"},
    {"hardware", "dtensor", "autograd_in_operators", "accounting"},
    {"lazy", "options", "environment", "downloads"},
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
# They import no other room, and none imports them.
APART = {"data", "cli"}
# The strategy shards any model: what a model's 4-bit weights ask of a mixed precision policy, the model says.
FORBIDDEN = {("distributed", "quantization")}


def room(file: str) -> str:
    """The folder of a file; in `modules/` also a file that lies there by itself."""
    top, _, rest = file.partition(".")
    return (rest.partition(".")[0] if top == "modules" else file.rpartition(".")[0]) or top


ARROWS = [
    (importer, imported, name)
    for importer in FILES
    for module, name in imports(importer)
    if (imported := own_file(importer, module, name)) is not None
]
BETWEEN_ROOMS = [(room(a), room(b), f"{a} -> {b}") for a, b, _ in ARROWS if room(a) != room(b)]


def allowed(source: str, target: str) -> bool:
    if source.startswith("recipes"):
        return target != "recipes.benchmarks"
    if source in ("kernels", "callbacks"):
        return False
    if source == "modules" or target in ("kernels", "lazy", "options", "downloads"):
        return target not in ("callbacks", "recipes", "recipes.benchmarks")
    return (source, target) not in FORBIDDEN and FLOOR.get(source, 99) < FLOOR.get(target, -1)


def test_every_room_has_its_place() -> None:
    rooms = {room(file) for file in FILES}
    assert rooms == {*FLOOR, *APART, "kernels", "callbacks", "recipes", "recipes.benchmarks"}


def test_no_arrow_points_where_it_must_not() -> None:
    assert len(BETWEEN_ROOMS) > 100
    assert not [arrow for *ends, arrow in BETWEEN_ROOMS if not allowed(*ends)]


@pytest.mark.parametrize("between", ["files", "rooms"])
def test_there_are_no_circles(between: str) -> None:
    edges = [(a, b) if between == "files" else (room(a), room(b)) for a, b, _ in ARROWS]
    graph = TopologicalSorter[str]()
    for source, target in edges:
        if source != target or between == "files":
            graph.add(source, target)
    graph.prepare()  # raises CycleError, which names the circle


def test_underscored_files_and_names_stay_in_their_folder() -> None:
    crossing = [
        f"{a}: {b} {name}"
        for a, b, name in ARROWS
        if room(a) != room(b) and any(part.startswith("_") for part in (*b.split("."), name))
    ]
    assert not crossing
