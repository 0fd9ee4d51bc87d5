"""ONNX files with free batch and length, from examples of one sample: torch.export alone would fix axes of size 1."""

import pytest
import torch
from transformers import BertForSequenceClassification

from hf_r2 import R2QuantConfig, quantize
from tests.models import float_model, inputs_for

pytest.importorskip("onnx", reason="needs the extra hf_r2[onnx]")
pytest.importorskip("onnxscript", reason="needs the extra hf_r2[onnx]")
ort = pytest.importorskip("onnxruntime", reason="needs the extra hf_r2[onnx]")

from hf_r2.export.onnx import to_onnx  # noqa: E402
from hf_r2.export.onnx_parts import to_onnx_parts  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:::copyreg", "ignore:::torch", "ignore:::onnxscript")


def agree(file, packed, inputs):
    """Whether the file gives the packed model's logits."""
    session = ort.InferenceSession(str(file))
    with torch.no_grad():
        ours = packed(**inputs).logits
    found = torch.from_numpy(session.run(["logits"], {key: value.numpy() for key, value in inputs.items()})[0])
    return found.shape == ours.shape and float((found - ours).abs().max() / ours.abs().max()) < 1e-3


def tokens(*shape):
    return torch.randint(3, 40, shape, generator=torch.Generator().manual_seed(1))


def test_texts(tmp_path):
    packed = quantize(float_model("bert"), R2QuantConfig(weight_bits=4))
    ids = tokens(1, 6)
    to_onnx(packed, tmp_path / "a.onnx", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, dynamic=True)
    for other in ((3, 9), (1, 1)):
        ids = tokens(*other)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        assert agree(tmp_path / "a.onnx", packed, {"input_ids": ids, "attention_mask": mask}), other


def test_images(tmp_path):
    packed = quantize(float_model("resnet"), R2QuantConfig(weight_bits=8, act_bits=8), [inputs_for("resnet")])
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    to_onnx(packed, tmp_path / "a.onnx", {"pixel_values": images[:1]}, dynamic=True)
    for count in (3, 1):
        assert agree(tmp_path / "a.onnx", packed, {"pixel_values": images[:count]}), count


def test_encoder_and_decoder(tmp_path):
    packed = quantize(float_model("marian"), R2QuantConfig(weight_bits=4))
    start = torch.ones(1, 1, dtype=torch.long)  # as generation begins
    to_onnx_parts(packed, tmp_path, {"input_ids": tokens(1, 7), "decoder_input_ids": start})
    encoder, decoder = (ort.InferenceSession(str(tmp_path / f"{part}_model.onnx")) for part in ("encoder", "decoder"))
    for batch, source, target in ((3, 9, 4), (1, 5, 1)):
        ids, written = tokens(batch, source), tokens(batch, target)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        states = encoder.run(["last_hidden_state"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
        beside = {"encoder_hidden_states": states, "encoder_attention_mask": mask.numpy()}
        found = torch.from_numpy(decoder.run(["logits"], {"input_ids": written.numpy(), **beside})[0])
        with torch.no_grad():
            ours = packed(input_ids=ids, attention_mask=mask, decoder_input_ids=written).logits
        assert found.shape == ours.shape and float((found - ours).abs().max() / ours.abs().max()) < 1e-3


def test_what_every_sample_shares_and_what_is_no_tensor(tmp_path):
    packed = quantize(float_model("bert"), R2QuantConfig(weight_bits=4))
    shared = {"position_ids": torch.arange(6)[None].flip(1), "output_attentions": False}
    to_onnx(packed, tmp_path / "a.onnx", {"input_ids": tokens(2, 6), **shared}, dynamic=True)
    session = ort.InferenceSession(str(tmp_path / "a.onnx"))
    positions = torch.arange(4)[None].flip(1)
    with torch.no_grad():
        ours = packed(input_ids=tokens(3, 4), position_ids=positions).logits
    found = session.run(["logits"], {"input_ids": tokens(3, 4).numpy(), "position_ids": positions.numpy()})[0]
    assert float((torch.from_numpy(found) - ours).abs().max() / ours.abs().max()) < 1e-3


class InPairs(BertForSequenceClassification):
    """It looks at its batch size, which torch.export then fixes."""

    def forward(self, input_ids=None, **more):
        return super().forward(input_ids=input_ids if input_ids.shape[0] == 2 else input_ids + 1, **more)


class OfSixWords(BertForSequenceClassification):
    """Likewise with the length."""

    def forward(self, input_ids=None, **more):
        return super().forward(input_ids=input_ids if input_ids.shape[1] == 6 else input_ids + 1, **more)


@pytest.mark.parametrize(
    ("kind", "said"), [(InPairs, "batch size .*axis 0 of 'input_ids'"), (OfSixWords, "length .*axis 1 of 'input_ids'")]
)
def test_a_model_that_fixes_an_axis_is_refused(tmp_path, kind, said):
    packed = quantize(kind(float_model("bert").config).eval(), R2QuantConfig(weight_bits=4))
    with pytest.raises(ValueError, match=f"{kind.__name__} .*{said}.*dynamic=False"):
        to_onnx(packed, tmp_path / "a.onnx", {"input_ids": tokens(1, 6)}, dynamic=True)
    assert not list(tmp_path.iterdir())
