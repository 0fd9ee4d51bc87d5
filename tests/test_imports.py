"""Who imports whom: downwards only, and transformers only where it has to be."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_r2"
FILES = sorted(p.relative_to(PACKAGE).with_suffix("").as_posix() for p in PACKAGE.rglob("*.py"))
# From the ground up: a file may import those of lower levels.
LEVELS = [
    {
        "vectors",
        "encoders/attention",
        "grid",
        "layers",
        "integrity",
        "hub",
        "model_card",
        "metrics",
        "plots",
        "dressed",
        "names",
        "batches",
        "loss_division",
        "optimizer_groups",
    },
    {
        "packing",
        "spec",
        "lowrank",
        "factor_layers",
        "range_kernel",
        "ranges",
        "encoders/kmeans",
        "encoders/soft_cluster",
        "graph/trace",
        "graph/fold",
    },
    {"encoders/base"},
    {
        "losses",
        "encoders/affine",
        "encoders/activations",
        "encoders/palette",
        "encoders/soft_scalars",
        "encoders/learned",
        "encoders/adapted",
        "adapter",
        "encoders/dorefa",
        "graph/chains",
        "graph/blocks",
    },
    {"encoders/lsq", "encoders/dkm"},
    {"encoders/trained_inputs"},
    {"encoders/__init__", "training_args", "graph/equalize", "graph/__init__", "graph/capture", "ptq/notes"},
    {
        "entropy",
        "attach",
        "packed_layers",
        "trainer",
        "float_passes",
        "graph/statistics",
        "ptq/layer_error",
        "ptq/rounding",
    },
    {"calibration", "ptq/learned_step", "ptq/distribution", "ptq/walk"},
    {"ptq/learn_layer", "ptq/bias"},
    {
        "ptq/nearest",
        "ptq/mse",
        "ptq/percentile",
        "ptq/requant",
        "ptq/squant",
        "ptq/dfq",
        "ptq/adaround",
        "ptq/reconstruct",
    },
    {"coded", "ptq/pdquant", "ptq/residual", "ptq/tap_means", "ptq/input_moments"},
    {"ptq/rank_search"},
    {"ptq/cora"},
    {"ptq/__init__"},
    {"quant_config", "report", "tied", "saving"},
    {"road"},
    {"checkpoint"},
    {"verbs", "export/__init__", "export/plain", "export/onnx_codes", "export/onnx_graph"},
    {"export/onnx_layers", "export/onnx_seams"},
    {"export/onnx_dress"},
    {"export/onnx_report"},
    {"export/onnx"},
    {"__init__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
WITH_TRANSFORMERS = {
    *(
        "export/onnx",
        "export/plain",
        "quant_config",
        "tied",
        "saving",
        "road",
        "checkpoint",
        "trainer",
        "training_args",
    ),
    *("hub", "model_card", "metrics"),
}


def imports_of(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    for module in imports_of(name):
        if module.startswith("hf_r2"):
            target = module.removeprefix("hf_r2").lstrip(".").replace(".", "/") or "__init__"
            target = f"{target}/__init__" if f"{target}/__init__" in LEVEL else target
            assert LEVEL[target] < LEVEL[name], f"{name} imports {target}"


@pytest.mark.parametrize("name", FILES)
def test_transformers_is_imported_only_where_it_has_to_be(name):
    outside = {m.split(".")[0] for m in imports_of(name)} & {"transformers", "huggingface_hub", "evaluate", "datasets"}
    assert not outside or name in WITH_TRANSFORMERS | {"__init__"}


def test_every_file_has_its_level():
    assert set(FILES) == set(LEVEL)


def test_files_stay_small():
    for name in FILES:
        assert (PACKAGE / f"{name}.py").read_text().count("\n") <= 350, name
