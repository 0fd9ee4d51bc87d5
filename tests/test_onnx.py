"""Packed models in onnxruntime: the same logits, integer operators, files of the packed size, and what is refused."""

import builtins
import copy
import logging
from collections import Counter

import pytest
import torch

from hf_r2 import R2QuantConfig, prepare, quantize
from hf_r2.encoders.base import Encoded
from hf_r2.packed_layers import adapter_of, packed_layers
from hf_r2.report import report as size_report
from tests.models import float_model, inputs_for, logits

onnx = pytest.importorskip("onnx", reason="needs the extra hf_r2[onnx]")
pytest.importorskip("onnxscript", reason="needs the extra hf_r2[onnx]")
ort = pytest.importorskip("onnxruntime", reason="needs the extra hf_r2[onnx]")

from hf_r2.export import onnx as export  # noqa: E402
from hf_r2.export.onnx import to_onnx  # noqa: E402
from hf_r2.export.onnx_dress import dress_, room_for_bias  # noqa: E402
from hf_r2.export.onnx_parts import to_onnx_parts  # noqa: E402
from hf_r2.export.onnx_quiet import NOISE, without_noise  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:::copyreg", "ignore:::torch", "ignore:::onnxscript")


def run(file, name, level=None):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if level is not None:
        options.graph_optimization_level = level
    session = ort.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    feeds = {key: value.numpy() for key, value in inputs_for(name).items()}
    return torch.from_numpy(session.run(["logits"], {i.name: feeds[i.name] for i in session.get_inputs()})[0])


def distance(one, other):
    return float((one - other).abs().max() / other.abs().max())


def adapted(bits):
    options = {"base": "nearest", "ranks": "equal", "budget": 0.5, "adapter_bits": bits, "progress": False}
    return {"method": "cora", "options": options}


CASES = [
    ("resnet", {"weight_bits": 8, "act_bits": 8}),
    ("mobilenet_v1", {"weight_bits": 4, "act_bits": 8}),
    ("vit", {"weight_bits": 2, "act_bits": 4, "granularity": "per_tensor", "symmetric": False}),
    ("bert", {"weight_bits": 4, **adapted(8)}),
    ("mobilebert", {"weight_bits": 1, "act_bits": 8, "act_range": "dynamic", **adapted(6)}),
    ("resnet", {"weight_bits": 3, "act_bits": 8, **adapted(16)}),
    ("gpt2", {"method": "dkm", "weight_bits": 2}),
    ("resnet", {"method": "dkm", "weight_bits": 4, "options": {"dim": 2}}),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_onnxruntime_computes_what_the_packed_model_does(tmp_path, name, settings):
    packed = quantize(float_model(name), R2QuantConfig(**settings), [inputs_for(name)])
    said = to_onnx(packed, tmp_path / "model.onnx", inputs_for(name))
    ours = logits(packed, name)
    adapters = {n: layer for n, layer in packed_layers(packed).items() if adapter_of(layer) is not None}
    for layer, module in adapters.items():  # linear layers keep their codes and get two products beside
        linear = isinstance(module, torch.nn.Linear) and ("act_bits" in settings or module.in_features % 16 == 0)
        assert (said["layers"][layer]["mode"] == "float") == (not linear)
    assert bool(adapters) == (settings.get("method") == "cora")
    assert distance(run(tmp_path / "model.onnx", name), ours) < 1e-3
    assert distance(logits(float_model(name), name), ours) > 1e-3  # quantization is there to be seen


def test_convolutions_that_follow_each_other_run_on_integers(tmp_path):
    packed = quantize(
        float_model("mobilenet_v1"), R2QuantConfig(weight_bits=8, act_bits=8), [inputs_for("mobilenet_v1")]
    )
    said = to_onnx(packed, tmp_path / "model.onnx", inputs_for("mobilenet_v1"))
    assert said["operators"]["QLinearConv"] == 26  # all but the last, which the pooling reads
    assert said["operators"]["QGemm"] == 1
    kinds = Counter(entry["operator"] for entry in said["layers"].values())
    assert kinds["QLinearConv"] == 26 and list(said["float_layers"]) == ["mobilenet_v1.layer.25.convolution"]
    assert "pass seams" in said["float_layers"]["mobilenet_v1.layer.25.convolution"]
    assert said["size_bytes"] == (tmp_path / "model.onnx").stat().st_size


def test_seams_make_a_residual_network_integer_throughout(tmp_path):
    packed = quantize(float_model("resnet"), R2QuantConfig(weight_bits=8, act_bits=8), [inputs_for("resnet")])
    said = to_onnx(packed, tmp_path / "model.onnx", inputs_for("resnet"), seams=[inputs_for("resnet")])
    assert said["operators"]["QLinearConv"] == 6 and said["operators"]["QLinearAdd"] == 2
    assert not {"Conv", "FusedConv"} & set(said["operators"]) and not said["float_layers"]
    assert len(said["seams"]) == 5
    plain = run(tmp_path / "model.onnx", "resnet", ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    integer = run(tmp_path / "model.onnx", "resnet")
    assert distance(integer, plain) < 1e-3  # the kernels compute what the graph says
    assert distance(integer, logits(packed, "resnet")) < 0.03  # and that is the model with seven more roundings


def test_three_bit_weights_lie_packed_in_a_file_that_computes_the_same(tmp_path):
    packed = quantize(float_model("mobilenet_v2"), R2QuantConfig(weight_bits=3), [inputs_for("mobilenet_v2")])
    to_onnx(packed, tmp_path / "model.onnx", inputs_for("mobilenet_v2"))
    assert distance(run(tmp_path / "model.onnx", "mobilenet_v2"), logits(packed, "mobilenet_v2")) < 1e-3
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    large = {n: m for n, m in packed_layers(packed).items() if m.weight_packed.numel() > export.FOLD_LIMIT}
    assert len(large) > 20
    for name, module in large.items():
        assert torch.equal(torch.from_numpy(stored[f"{name}.weight_packed"].flatten().copy()), module.weight_packed)
    assert sum(a.nbytes for a in stored.values()) < 1.05 * size_report(packed)["size_bytes"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A packed BERT whose queries and keys have the same weight, its file with free batch and length, and the report."""
    model, file = copy.deepcopy(float_model("bert")), tmp_path_factory.mktemp("bert") / "model.onnx"
    attention = model.bert.encoder.layer[0].attention.self
    attention.key.weight.data = attention.query.weight.data.clone()
    packed = quantize(model, R2QuantConfig(weight_bits=8, act_bits=8), [inputs_for("bert")])
    return packed, file, to_onnx(packed, file, inputs_for("bert"), dynamic=True)


def test_batch_and_length_may_be_dynamic(bert):
    packed, file, _ = bert
    session = ort.InferenceSession(str(file))
    for shape in ((5, 9), (1, 3)):
        ids = torch.randint(3, 40, shape)
        with torch.no_grad():
            ours = packed(input_ids=ids).logits
        found = session.run(["logits"], {"input_ids": ids.numpy()})[0]
        assert distance(torch.from_numpy(found), ours) < 1e-3


def test_layers_with_equal_codes_are_each_found_among_the_integer_operators(bert):
    said = bert[2]
    linear = [name for name, layer in packed_layers(bert[0]).items() if isinstance(layer, torch.nn.Linear)]
    kinds = {"QGemm", "MatMulIntegerToFloat"}  # of a matrix, and of a batch of them whose sizes are not known
    assert len(linear) == 8 and {said["layers"][name]["operator"] for name in linear} == kinds
    assert sum(said["operators"][kind] for kind in kinds) == 7  # queries and keys are one operator
    assert not said["float_layers"]


def test_encoder_and_decoder_are_two_files_that_work_together(tmp_path):
    packed = quantize(float_model("marian"), R2QuantConfig(weight_bits=4), [inputs_for("marian")])
    said = to_onnx_parts(packed, tmp_path, inputs_for("marian"))
    assert said["encoder"]["layers"]["layers.0.fc1"]["operator"] == "MatMulNBits"
    assert said["decoder"]["layers"]["lm_head"]["operator"] == "MatMulNBits"
    assert not any("encoder.layers" in name for name in said["decoder"]["layers"])
    ids = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    written = torch.tensor([[1, 5, 6, 7], [1, 9, 3, 3], [1, 3, 8, 9]])
    with torch.no_grad():
        ours = packed(input_ids=ids, attention_mask=mask, decoder_input_ids=written).logits
    encoder, decoder = (ort.InferenceSession(str(tmp_path / f"{part}_model.onnx")) for part in ("encoder", "decoder"))
    states = encoder.run(["last_hidden_state"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    beside = {"encoder_hidden_states": states, "encoder_attention_mask": mask.numpy()}
    for length in (1, 4):  # as generation goes on
        found = decoder.run(None, {"input_ids": written[:, :length].numpy(), **beside})
        assert len(found) == 1 and distance(torch.from_numpy(found[0]), ours[:, :length]) < 1e-3
    with pytest.raises(ValueError, match="BertForSequenceClassification is not an encoder with a decoder: to_onnx"):
        to_onnx_parts(float_model("bert"), tmp_path)
    with pytest.raises(ValueError, match="inputs of input_ids lack decoder_input_ids"):
        to_onnx_parts(packed, tmp_path, {"input_ids": ids})


def test_two_bit_linear_layers_are_unpacked_at_load_unless_they_are_to_stay_packed():
    packed = quantize(float_model("bert"), R2QuantConfig(weight_bits=2))
    for blocks, mode in (((4,), "float"), ((2, 4), "blocks")):
        assert dress_(copy.deepcopy(packed), blocks)["bert.pooler.dense"].mode == mode


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    model = float_model("resnet")
    with pytest.raises(ValueError, match=r"needs a packed model: call hf_r2.quantize"):
        to_onnx(model, tmp_path / "a.onnx")
    half = prepare(copy.deepcopy(model), R2QuantConfig(method="lsq", weight_bits=4))
    with pytest.raises(ValueError, match=r"half trained: call hf_r2.convert"):
        to_onnx(half, tmp_path / "a.onnx")
    packed = quantize(model, R2QuantConfig(weight_bits=4))
    with pytest.raises(ValueError, match="opset 17 has no BitwiseAnd"):
        to_onnx(packed, tmp_path / "a.onnx", opset=17)
    with pytest.raises(
        ValueError, match=r"opset 26 is newer than the graphs that onnxscript makes: take 18 to 2\d; 20 is"
    ):
        to_onnx(packed, tmp_path / "a.onnx", opset=26)
    with pytest.raises(ValueError, match=r"is a folder; give the name of a file to write"):
        to_onnx(packed, tmp_path)
    with pytest.raises(ValueError, match="seams holds no batch"):
        to_onnx(packed, tmp_path / "a.onnx", seams=[])
    with pytest.raises(ValueError, match=r"widths that MatMulNBits has, \(2, 4\) or none, got \(3,\)"):
        to_onnx(packed, tmp_path / "a.onnx", blocks=[3])
    with pytest.raises(ValueError, match=r"cannot be exported with inputs \{'pixel_values': \(2, 3, 2\)\}"):
        to_onnx(packed, tmp_path / "a.onnx", {"pixel_values": torch.zeros(2, 3, 2)})
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else builtins.object())
    with pytest.raises(ImportError, match=r"needs onnxruntime: pip install '\.\[onnx\]' in the folder of"):
        to_onnx(packed, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_the_opset_is_one_that_onnxruntime_runs(tmp_path, monkeypatch):
    from hf_r2.export import onnx_report

    packed = quantize(float_model("bert"), R2QuantConfig(weight_bits=4))
    assert onnx_report.runs(export.OPSET) and not onnx_report.runs(99)
    assert to_onnx(packed, tmp_path / "a.onnx", inputs_for("bert"), opset=18)["opset"] == 18
    assert {i.domain: i.version for i in onnx.load(tmp_path / "a.onnx").opset_import}[""] == 18
    monkeypatch.setattr(onnx_report, "runs", lambda opset: opset < 23)
    with pytest.raises(
        ValueError, match=r"opset 24 is newer than onnxruntime [\d.]+.*: take 18 to 22; 20 is what is tested"
    ):
        to_onnx(packed, tmp_path / "a.onnx", opset=24)


def test_a_missing_folder_is_made_before_the_work(tmp_path, monkeypatch):
    packed = quantize(float_model("resnet"), R2QuantConfig(weight_bits=4))
    file, found = tmp_path / "new" / "deep" / "a.onnx", []
    program = export._program
    monkeypatch.setattr(export, "_program", lambda *args: found.append(file.parent.is_dir()) or program(*args))
    to_onnx(packed, file, inputs_for("resnet"))
    assert found == [True] and file.is_file()


def test_a_model_without_a_place_for_seams_is_said_to_be_one(tmp_path):
    packed = quantize(float_model("bert"), R2QuantConfig(weight_bits=4))
    said = to_onnx(packed, tmp_path / "a.onnx", inputs_for("bert"), seams=[inputs_for("bert")])
    assert said["seams"] == [] and said["notes"][-1].startswith(
        "no seams were placed: no convolution of quantized inputs"
    )


class Heard(logging.Handler):
    """Keeps what reaches it."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def heard():
    handler = Heard()
    for name in NOISE:
        logging.getLogger(name).addHandler(handler)
    yield handler.messages
    for name in NOISE:
        logging.getLogger(name).removeHandler(handler)


def test_exports_are_quiet_but_for_what_is_new(tmp_path, capsys, heard):
    packed = quantize(float_model("bert"), R2QuantConfig(weight_bits=4))
    to_onnx(packed, tmp_path / "a.onnx", inputs_for("bert"))
    assert not heard and capsys.readouterr().out == ""
    with without_noise():
        print("[torch.onnx] Run decompositions...\nanother thing")
        for name, starts in NOISE.items():
            logging.getLogger(name).warning("%s, and so on", starts[0])
            logging.getLogger(name).warning("another warning of %s", name)
    assert heard == [f"another warning of {name}" for name in NOISE] and capsys.readouterr().out == "another thing\n"
    first, starts = next(iter(NOISE.items()))
    logging.getLogger(first).warning("%s, and so on", starts[0])
    assert heard[-1] == f"{starts[0]}, and so on"


def test_a_kernel_that_onnxruntime_lacks_is_gone_round(tmp_path, monkeypatch):
    from hf_r2.export import onnx_report

    packed = quantize(float_model("bert"), R2QuantConfig(weight_bits=4), [inputs_for("bert")])
    real = onnx_report.optimized

    def without_blocks(data):
        if b"MatMulNBits" in data:
            raise onnx_report.KernelError("no kernel for MatMulNBits")
        return real(data)

    monkeypatch.setattr(onnx_report, "optimized", without_blocks)
    said = to_onnx(packed, tmp_path / "model.onnx", inputs_for("bert"))
    assert "unpacked at load: no kernel for MatMulNBits" in said["notes"][-1]
    assert distance(run(tmp_path / "model.onnx", "bert"), logits(packed, "bert")) < 1e-3


def test_biases_of_nearly_dead_channels_fit_in_32_bits():
    zero = torch.full((2, 1), 128.0)
    what = Encoded(torch.tensor([[129, 255], [130, 1]], dtype=torch.uint8), 8, torch.tensor([[1e-12], [1e-2]]), zero)
    room = room_for_bias(what, 0, torch.tensor([4.0, 4.0]))
    assert room.scale is not None and 4.0 / float(room.scale[0]) < 2**31
    assert torch.equal(room.decode()[1], what.decode()[1]) and torch.equal(room.codes[0], torch.tensor([128, 128]))
    assert (room.decode() - what.decode()).abs().max() < 1e-8 * 4.0
    assert room_for_bias(what, 0, torch.tensor([1e-9, 4.0])) is what


def test_onnxruntime_does_not_quantize_float_weights_by_itself(tmp_path):
    """It would, one scale for the tensor, where QuantizeLinear stands around a convolution with a float weight."""
    settings = {"method": "dkm", "weight_bits": 4, "act_bits": 8, "act_range": "static"}
    packed = quantize(float_model("mobilenet_v1"), R2QuantConfig(**settings), [inputs_for("mobilenet_v1")])
    said = to_onnx(packed, tmp_path / "model.onnx", inputs_for("mobilenet_v1"))
    assert not {"QLinearConv", "QGemm"} & set(said["operators"]) and len(said["float_layers"]) == 28
    assert set(said["float_layers"].values()) == {"a palette's levels are no integers"}
    assert distance(run(tmp_path / "model.onnx", "mobilenet_v1"), logits(packed, "mobilenet_v1")) < 1e-3
