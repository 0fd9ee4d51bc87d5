"""Who imports whom: downwards only, and transformers only where it has to be."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_r2
from hf_r2 import checkpoint, registration

PACKAGE = Path(__file__).parents[1] / "hf_r2"
FILES = sorted(p.relative_to(PACKAGE).with_suffix("").as_posix() for p in PACKAGE.rglob("*.py"))
# From the ground up: a file may import those of lower levels.
LEVELS = [
    {
        "vectors",
        "ptq/allowed",
        "encoders/attention",
        "grid",
        "layers",
        "integrity",
        "hub",
        "deployed",
        "export/onnx_quiet",
        "metrics",
        "plots",
        "dressed",
        "names",
        "batches",
        "loss_division",
        "optimizer_groups",
        "registration",
        "range_forms",
        "range_shards",
        "scalar_optimizer",
        "leaves",
    },
    {
        "model_card",
        "packing",
        "spec",
        "lowrank",
        "factor_layers",
        "range_compiled",
        "range_gradient",
        "ranges",
        "encoders/kmeans",
        "encoders/soft_cluster",
        "graph/trace",
        "graph/fold",
    },
    {"encoders/base", "range_kernel"},
    {
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
    {"losses", "encoders/lsq", "encoders/dkm"},
    {"encoders/trained_inputs", "range_step"},
    {"encoders/__init__", "training_args", "graph/equalize", "graph/__init__", "graph/capture"},
    {
        "entropy",
        "attach",
        "packed_layers",
        "split_weights",
        "float_passes",
        "graph/statistics",
        "ptq/layer_error",
        "ptq/rounding",
    },
    {"trainer", "calibration", "ptq/learned_step", "ptq/distribution", "ptq/walk"},
    {"ptq/learn_layer", "ptq/bias", "ptq/notes"},
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
    {"coded", "kernels", "ptq/pdquant", "ptq/residual", "ptq/tap_means", "ptq/input_moments"},
    {"ptq/rank_search"},
    {"ptq/cora"},
    {"ptq/__init__"},
    {"quant_config", "report", "tied", "saving", "direct"},
    {"road"},
    {"checkpoint"},
    {
        "verbs",
        "export/__init__",
        "export/plain",
        "export/coreml",
        "export/onnx_codes",
        "export/onnx_graph",
        "export/onnx_axes",
    },
    {"export/onnx_layers", "export/onnx_seams"},
    {"export/onnx_dress"},
    {"export/onnx_report"},
    {"export/onnx"},
    {"export/onnx_parts"},
    {"__init__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
WITH_TRANSFORMERS = {
    *(
        "export/onnx",
        "export/onnx_parts",
        "export/coreml",
        "export/plain",
        "quant_config",
        "tied",
        "saving",
        "road",
        "checkpoint",
        "direct",
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


NOTED = """
import sys
noted = []
sys.addaudithook(lambda event, _: noted.append(event) if event in ("socket.connect", "subprocess.Popen", "os.system") else None)
"""


def in_a_new_process(code):
    """What `code`, which makes a dict `said`, finds in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)}
    code = f"{NOTED}{code}\nimport json\nprint(json.dumps(said))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_us_loads_nothing_else_and_registers_when_models_are_there():
    said = in_a_new_process("""
before = set(sys.modules)
import hf_r2
said = {"alone": sorted(m for m in set(sys.modules) - before if m.split(".")[0] not in sys.stdlib_module_names)}
import torch, transformers
heavy = ("transformers.modeling_utils", "transformers.quantizers.auto", "datasets")
said["transformers"] = [m for m in heavy if m in sys.modules]
from transformers import BertModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
said["registered"] = [table["hf_r2"].__name__ for table in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)]
said["trainer"] = [m for m in ("transformers.trainer", "datasets", "hf_r2.trainer") if m in sys.modules]
said["finders"] = [type(finder).__name__ for finder in sys.meta_path if type(finder).__module__.startswith("hf_r2")]
said["loader"] = type(sys.modules["transformers.modeling_utils"].__loader__).__name__
hf_r2.quantize, hf_r2.R2Trainer
said["noted"] = noted
""")
    assert said == {
        "alone": ["hf_r2", "hf_r2.registration"], "transformers": [], "registered": ["R2HfQuantizer", "R2QuantConfig"],
        "trainer": [], "finders": [], "loader": "SourceFileLoader", "noted": [],
    }  # fmt: skip


def test_importing_us_after_the_models_registers_at_once(monkeypatch):
    assert registration.AWAITED in sys.modules and checkpoint.R2HfQuantizer is hf_r2.R2HfQuantizer
    imported = []
    monkeypatch.setattr(registration.importlib, "import_module", imported.append)
    registration.register()
    assert imported == ["hf_r2.checkpoint"]


def test_every_public_name_is_there():
    for name in hf_r2.__all__:
        assert getattr(hf_r2, name) is vars(importlib.import_module(f"hf_r2.{hf_r2._HOME[name]}"))[name]
    assert set(hf_r2.__all__) == set(hf_r2._HOME) and set(hf_r2.__all__) <= set(dir(hf_r2))
    with pytest.raises(AttributeError, match="module 'hf_r2' has no attribute 'quantise'"):
        hf_r2.quantise  # noqa: B018


def test_files_stay_small():
    for name in FILES:
        assert (PACKAGE / f"{name}.py").read_text().count("\n") <= 350, name
