"""The shape of the code: packages that say what they hold, imports one way between them, budgets."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sdlora
from sdlora.families.base import DiffusionModel
from sdlora.families.table import FAMILIES

ROOT = Path(sdlora.__file__).parent
UI = ROOT.parent / "ui"

PACKAGES = (
    "config",
    "diffusion",
    "families",
    "data.reading",
    "data.batching",
    "data.check",
    "data.captioning",
    "adapters",
    "formats",
    "generation",
    "surgery",
    "judging",
    "inspecting",
    "exporting",
    "training",
    "demonstration",
    "commands",
)
"""Each package may import from the modules at the root and from earlier packages; docs/architecture.md."""

MOST_ROOT_MODULES = 10
MOST_PACKAGES = 17
"""Sixteen, and captioning: it runs models, which neither reading nor checking a folder may wait for."""
MOST_FUNCTION_LINES = 60
MOST_FAMILY_MEMBERS = 11
"""Eight were meant. Three of those are one now (`facts`); `info` and `base` are data, no work for a family;
drawing needs `decode_latents`, small cards `prepare`, and `encoder_fingerprint` lets caches be shared."""


def modules_of(root: Path) -> dict[str, Path]:
    """Return every module below ``root`` by its dotted name; a package's own is ``NAME.__init__``."""
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def package_of(module: str) -> str:
    """Return the package of a module, empty for those at the root; a folder inside one belongs to it."""
    folder = module.rpartition(".")[0]
    return next((package for package in PACKAGES if f"{folder}.".startswith(f"{package}.")), folder)


def imports_of(module: str, path: Path, known: dict[str, Path], name: str) -> set[str]:
    """Return the modules that one imports anywhere: at its top, in functions, for type checking."""
    package = module.split(".")[:-1]
    targets: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                start = package[: len(package) - (node.level - 1)]
            elif (node.module or "").split(".")[0] == name:
                start = []
            else:
                continue
            parts = (node.module or "").split(".") if node.module else []
            place = [*start, *(parts if node.level else parts[1:])]
            for alias in node.names:
                whole = ".".join([*place, alias.name])
                target = whole if whole in known else ".".join(place)
                targets.add(target if target in known else f"{target}.__init__".lstrip("."))
        elif isinstance(node, ast.Import):
            targets |= {
                alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == name
            }
    return targets - {module}


def graph_of(root: Path, name: str) -> dict[str, set[str]]:
    known = modules_of(root)
    graph = {module: imports_of(module, path, known, name) for module, path in known.items()}
    unknown = {target for targets in graph.values() for target in targets} - set(known) - {""}
    assert unknown == set(), unknown
    return graph


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Return some cycle, or nothing."""
    state: dict[str, int] = {}

    def visit(node: str, trail: list[str]) -> list[str]:
        if state.get(node) == 2:
            return []
        if state.get(node) == 1:
            return [*trail[trail.index(node) :], node]
        state[node] = 1
        for target in sorted(graph.get(node, ())):
            if cycle := visit(target, [*trail, node]):
                return cycle
        state[node] = 2
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


def test_imports_go_one_way_between_packages() -> None:
    graph = graph_of(ROOT, "sdlora")
    assert len(graph) > 130
    level = {"": -1, **{package: number for number, package in enumerate(PACKAGES)}}
    outside = {"__init__", "__main__"}  # the doors of the house
    wrong = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        if module not in outside and not module.endswith("__init__")
        for target in targets
        if level[package_of(target)] > level[package_of(module)]
    ]
    assert wrong == []


def test_every_package_has_its_place_in_the_order() -> None:
    packages = {package_of(module) for module in modules_of(ROOT) if not module.endswith("__init__")} - {""}
    assert packages == set(PACKAGES)


@pytest.mark.parametrize(("root", "name"), [(ROOT, "sdlora"), (UI, "sdlora_ui")])
def test_no_file_is_part_of_a_cycle(root: Path, name: str) -> None:
    graph = graph_of(root, name)
    assert len(graph) > 30
    assert cycle_in(graph) == []


def test_a_cycle_would_be_found() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_house_keeps_its_budgets() -> None:
    root_modules = [module for module in modules_of(ROOT) if "." not in module]
    assert len(root_modules) <= MOST_ROOT_MODULES, root_modules
    assert len(PACKAGES) <= MOST_PACKAGES


def test_every_package_says_what_it_holds_and_nothing_else() -> None:
    inits = [path for path in ROOT.rglob("__init__.py") if path.parent != ROOT]
    assert (
        len(inits) == len(PACKAGES) + 3
    )  # and data/, which only holds packages, adapters/kinds/, config/foreign/
    for path in inits:
        tree = parsed(path)
        assert ast.get_docstring(tree), path
        assert len(tree.body) == 1, f"{path}: code here is imported with every module of the package"


def test_no_package_has_the_name_of_a_public_function() -> None:
    assert not {package.split(".")[0] for package in PACKAGES} & set(sdlora.__all__)


def test_nothing_names_a_family_outside_the_families() -> None:
    named, count = [], 0
    for root in (ROOT, UI):
        for module, path in modules_of(root).items():
            if root == ROOT and module.startswith(("families", "config.foreign")):  # words of other programs
                continue
            count += 1
            named += [f"{module}:{line}: {text}" for line, text in strings_of(path) if text in FAMILIES]
    assert count > 100
    assert named == ["data.reading.tokens:20: sd1"]  # the shipped tokenizer, which all of them share


def test_the_family_interface_stays_small() -> None:
    declared = {**vars(DiffusionModel), **DiffusionModel.__annotations__}
    members = [name for name in declared if not name.startswith("_")]
    assert len(members) <= MOST_FAMILY_MEMBERS, members


def test_functions_fit_on_a_screen() -> None:
    long = []
    for root in (ROOT, UI):
        for module, path in modules_of(root).items():
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                    lines = node.end_lineno - node.lineno
                    if lines > MOST_FUNCTION_LINES:
                        long.append(f"{module}.{node.name}: {lines}")
    assert long == []


def test_nothing_unpickles() -> None:
    users = [
        module
        for module, path in modules_of(ROOT).items()
        if {"pickle", "torch.load"}
        & {ast.unparse(node) for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute | ast.Name)}
    ]
    assert users == []


def strings_of(path: Path) -> list[tuple[int, str]]:
    """Return (line, text) of every string constant that is no docstring or other bare statement."""
    tree = parsed(path)
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare
    ]


def test_no_denoiser_is_taken_for_granted_outside_the_families_and_formats() -> None:
    """What it is called, and where adapters go in it, families declare (families/facts.py)."""
    named, count = [], 0
    for root in (ROOT, UI):
        for module, path in modules_of(root).items():
            if root == ROOT and module.startswith(("families", "formats", "config.foreign")):
                continue  # the last has the words of other programs
            count += 1
            named += [f"{module}:{line}: {text}" for line, text in strings_of(path) if "unet" in text]
    assert count > 100
    assert named == []
