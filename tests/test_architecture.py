"""The shape of the code: imports go one way, and no family is named outside the families."""

from __future__ import annotations

import ast
from pathlib import Path

import sdlora
from sdlora.families.base import DiffusionModel

ROOT = Path(sdlora.__file__).parent

# Each layer may import from its own and earlier ones.
LAYERS = [
    {"errors", "events"},
    {"files", "section", "finite"},
    {"tensor_file", "data_config", "adapter_config"},
    {"config"},
    {"diffusion", "data", "devices", "demo_data"},
    {"families"},
    {"data.cache", "data.batches", "data.loader"},
    {"adapters"},
    {"formats"},
    {"surgery"},
    {"webui_card", "norms"},
    {
        "optim",
        "checkpoint",
        "plan",
        "objective",
        "samplers",
        "pictures",
        "png_info",
        "export",
        "base_inspection",
        "inspection",
    },
    {"parallel", "inspection_view"},
    {"feed"},
    {"render"},
    {"image_generator"},
    {"generate"},
    {"picture_proof"},
    {"continued", "learned"},
    {"memory"},
    {"run"},
    {"finish", "previews", "cost", "validation"},
    {"train"},
    {"style_features"},
    {"score", "page"},
    {"copying"},
    {"demo_page"},
    {"demo"},
    {"display"},
    {"data_outlook"},
    {"model_commands", "file_commands", "surgery_commands", "data_commands"},
    {"cli"},
    {"__init__", "__main__"},
]


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts)] = path
    return found


def layer_of(module: str) -> int:
    """Return the layer of the longest name that covers the module."""
    covering = [
        (len(name), level)
        for level, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    assert covering, f"{module} has no layer in this test; decide where it belongs"
    return max(covering)[1]


def imported(path: Path, module: str) -> set[str]:
    """Modules of the package that ``path`` imports at its top level or inside functions."""
    package = module.split(".")[:-1]
    if path.name == "__init__.py":
        package = module.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only or not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        prefix = package[: len(package) - (node.level - 1)]
        target = [*prefix, *(node.module.split(".") if node.module else [])]
        known = modules()
        for alias in node.names:
            whole = ".".join([*target, alias.name])
            found.add(whole if whole in known else ".".join(target))
    return {name for name in found if name}


def test_imports_go_one_way() -> None:
    all_modules = modules()
    assert len(all_modules) > 30
    wrong = [
        f"{module} imports {other}"
        for module, path in all_modules.items()
        if module not in ("__init__", "__main__")
        for other in imported(path, module)
        if layer_of(other) > layer_of(module)
    ]
    assert wrong == []


def test_nothing_names_a_family_outside_the_families() -> None:
    compared = []
    for module, path in modules().items():
        if module.startswith(("families", "formats")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and any(
                isinstance(part, ast.Constant) and part.value in ("sd1", "sd2", "sdxl", "sd3")
                for part in ast.walk(node)
            ):
                compared.append(f"{module}:{node.lineno}")
    assert compared == []


def test_the_family_interface_stays_small() -> None:
    members = [name for name in vars(DiffusionModel) if not name.startswith("_")]
    assert len(members) <= 16, members


def test_functions_fit_on_a_screen() -> None:
    long = []
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                code = node.end_lineno - node.lineno
                if code > 85:
                    long.append(f"{module}.{node.name}: {code}")
    assert long == []


def test_nothing_unpickles() -> None:
    users = [
        module
        for module, path in modules().items()
        if {"pickle", "torch.load"}
        & {
            ast.unparse(n)
            for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(n, ast.Attribute | ast.Name)
        }
    ]
    assert users == []
