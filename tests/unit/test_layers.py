"""The ground knows nothing of the top: a module imports only from modules that stand before it here."""

import ast
from pathlib import Path

import data2vec_vision

PACKAGE = Path(data2vec_vision.__file__).parent
GROUND = [
    "errors",
    "cpu",
    "distributed",
    "shares",
    "seeding",
    "patches",
    "masking",
    "schedules",
    "ema",
    "prototypes",
    "targets",
    "monitor",
    "verdict",
    "duplicates",
    "live_bytes",
    "resampling",
]
MODELS_AND_DATA = [
    "config",
    "knobs",
    "recipes",
    "device",
    "rasters",
    "tiff",
    "dicom",
    "modes",
    "arrays",
    "images",
    "looks",
    "transforms",
    "vit",
    "decoder",
    "index",
    "folders",
    "archives",
    "tables",
    "cache",
    "shards",
    "sources",
    "normalization",
    "survey",
    "loading",
    "data",
    "ramcache",
    "untrusted",
    "contents",
    "checkpoint",
    "pictures",
]
METHOD_NAMES = ["data2vec", "data2vec2", "ijepa", "mae", "msn", "swav"]
SAMPLES = ["samples", "samples.make"]
METHODS = ["methods.base", "methods.latent", *(f"methods.{name}" for name in METHOD_NAMES), "methods"]
JOBS = [
    "run",
    "failures",
    "resume",
    "labels",
    "partial",
    "writers",
    "extract",
    "probes",
    "split",
    "linear",
    "features",
    "findings",
    "evaluate",
    "plan",
    "skips",
    "figures",
    "messages",
    "loggers",
    "gallery",
    "report",
    "online",
    "train",
    "dry_run",
    "huggingface",
    "formats",
    "export",
    "inventory",
    "scan",
    "demo",
    "__main__",
]
ORDER = GROUND + MODELS_AND_DATA + SAMPLES + METHODS + JOBS


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Modules of the package that a file imports, anywhere in it; `from package import name` may import a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            parts = name.split(".")
            while parts and parts[0] == "data2vec_vision":
                if ".".join(parts[1:]) in ORDER:
                    yield ".".join(parts[1:])
                    break
                parts.pop()


FILES = {name: path for path in PACKAGE.rglob("*.py") if (name := module_name(path))}


def test_every_file_has_its_place():
    assert set(FILES) <= set(ORDER)


def test_imports_point_downwards():
    wrong = [
        f"{name} imports {other}"
        for name, path in FILES.items()
        for other in imports(path)
        if ORDER.index(other) >= ORDER.index(name)
    ]
    assert wrong == []


def test_the_ground_imports_nothing_but_errors_and_distributed():
    found = {(name, other) for name in GROUND for other in imports(FILES[name])}
    assert {other for _, other in found} <= {"errors", "distributed"}


def test_a_method_imports_no_other_method():
    methods = {name for name in FILES if name.startswith("methods.")} - {"methods.base", "methods.latent"}
    assert [(m, other) for m in methods for other in imports(FILES[m]) if other in methods | set(JOBS)] == []


def test_no_drawer_files():
    assert not {"utils", "helpers", "misc", "common"} & {path.stem for path in FILES.values()}
