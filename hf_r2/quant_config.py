"""`R2QuantConfig`: the recipe, and, once a model is packed, what is needed to load it again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_r2.encoders import ENCODERS
from hf_r2.float_passes import FloatPasses
from hf_r2.grid import check_bits
from hf_r2.layers import matches
from hf_r2.ptq import PTQ_METHODS
from hf_r2.ptq.allowed import check_values
from hf_r2.spec import LayerSpec

FORMAT_VERSION = 2
STAGES = ("recipe", "prepared", "packed")
STORAGES = {"packed": 1, "entropy": 2}  # each with the lowest format version that can read it
SHARED = [f.name for f in fields(FloatPasses)]
OF_THE_RUN = (
    "progress",
    "resume_dir",
    "trace_file",
)  # options that say nothing of the model, and paths of one machine
OVERRIDABLE = ("weight_bits", "granularity", "symmetric", "act_bits", "act_range", "options")


class R2QuantConfig(QuantizationConfigMixin):
    """How to quantize a model; every default is that of the papers' protocol (all layers, first and last included).

    Args:
        method: one of `PTQ_METHODS` (after training) or `ENCODERS` (trained; "dkm" also clusters after training).
        weight_bits: 1 to 8. 1-bit symmetric weights are plus and minus their mean magnitude.
        granularity: "per_channel" (output channels; rows of an embedding) or "per_tensor"; palettes are per tensor.
        symmetric: weights on a grid around zero; False: on a grid over their own range.
        act_bits: 2 to 8, or None for float activations; the inputs of every quantized layer, per tensor, asymmetric.
        act_range: "static" (calibrated on `batches`) or "dynamic" (the range of each batch as it comes).
        options: keyword options of the method, and those that all post-training methods share (`FloatPasses`: fold,
            equalize, absorb, relu6).
        overrides: {glob of layer names: {setting: value}}; later globs win.
        skip: globs of layer names that stay in float.
        first_last_bits: width of the weights and inputs of the first and the last layer; None (the papers' protocol): as
            the rest. The official codes of SQuant, BRECQ and PD-Quant keep 8 there.
        storage: "packed" (files hold exactly the bits) or "entropy" (codes and palettes entropy-coded as well: smaller files,
            the same model once loaded). It can be changed on a packed model's `config.quantization_config` before saving.

    `skeleton` (what folding and equalization changed), `layers`, `stage` and `version` are filled by the library and
    stored in config.json.

    Raises ValueError for a value that is not allowed, TypeError for an unknown setting or option; both name the known ones.
    """

    def __init__(
        self,
        method: str = "nearest",
        weight_bits: int = 4,
        granularity: str = "per_channel",
        symmetric: bool = True,
        act_bits: int | None = None,
        options: Mapping[str, Any] | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        skip: list[str] | tuple[str, ...] = (),
        act_range: str = "static",
        first_last_bits: int | None = None,
        storage: str = "packed",
        *,
        skeleton: Mapping[str, Any] | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        stage: str = "recipe",
        version: int = 1,
        quant_method: str = "hf_r2",
        **unknown: Any,
    ):
        if version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has hf_r2 format version {version}, and this hf_r2 reads up to {FORMAT_VERSION}: "
                "fetch its newer source and run pip install . there"
            )
        if unknown:
            known = [p for p in inspect.signature(R2QuantConfig).parameters if p != "unknown"]
            raise TypeError(f"unknown settings {', '.join(sorted(unknown))}; known ones are: {', '.join(known)}")
        if isinstance(skip, str):
            raise ValueError(f"skip must be a list of globs, got the string {skip!r}")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.method, self.weight_bits, self.granularity, self.symmetric = method, weight_bits, granularity, symmetric
        self.act_bits, self.act_range = act_bits, act_range
        self.options = dict(options or {})
        self.overrides = {glob: dict(settings) for glob, settings in (overrides or {}).items()}
        self.skip = list(skip)
        self.first_last_bits = first_last_bits
        self.skeleton = dict(skeleton or {})
        self.layers = {name: dict(layout) for name, layout in (layers or {}).items()}
        self.stage, self.storage = stage, storage
        self._check()

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses an unknown `storage`, which may be set until the model is saved; ValueError names those there are."""
        if name == "storage" and value not in tuple(STORAGES):
            raise ValueError(f"storage must be one of {', '.join(STORAGES)}; got {value!r}")
        super().__setattr__(name, value)

    def _check(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}; got {self.stage!r}")
        if self.method not in PTQ_METHODS and self.method not in ENCODERS:
            known = ", ".join([*PTQ_METHODS, *ENCODERS])
            raise ValueError(f"no method called {self.method!r}; there are: {known}")
        for glob, settings in self.overrides.items():
            unknown = set(settings) - set(OVERRIDABLE)
            if unknown:
                raise TypeError(
                    f"overrides[{glob!r}]: unknown settings {', '.join(sorted(unknown))}; "
                    f"known ones are: {', '.join(OVERRIDABLE)}"
                )
        if self.first_last_bits is not None:
            check_bits(self.first_last_bits, "first_last_bits")
        for spec in self._specs():
            check_options(spec)

    @property
    def version(self) -> int:
        """Format version of the checkpoints written with this config: the lowest that can read them."""
        return STORAGES[self.storage]

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the format version."""
        return {**super().to_dict(), "version": self.version}

    def _spec(self, settings: Mapping[str, Any] | None = None) -> LayerSpec:
        own = {name: getattr(self, name) for name in OVERRIDABLE}
        return LayerSpec(self.method, **{**own, **(settings or {})})

    def _specs(self) -> list[LayerSpec]:
        return [self._spec(), *(self._spec(settings) for settings in self.overrides.values())]

    def ends(self) -> dict[str, int]:
        """The settings of the first and the last layer that differ from the rest."""
        bits = {} if self.first_last_bits is None else {"weight_bits": self.first_last_bits}
        return bits | ({"act_bits": max(bits["weight_bits"], self.act_bits)} if bits and self.act_bits else {})

    def split_options(self) -> tuple[FloatPasses, dict[str, Any]]:
        """The options that all post-training methods share, and the method's own."""
        shared = {k: v for k, v in self.options.items() if k in SHARED}
        return FloatPasses(**shared), {k: v for k, v in self.options.items() if k not in SHARED}

    def spec_for(self, name: str) -> LayerSpec | None:
        """What is to be done to the layer of this name; None leaves it in float."""
        if matches(name, self.skip):
            return None
        merged: dict[str, Any] = {}
        for glob, settings in self.overrides.items():
            if matches(name, [glob]):
                merged.update(settings)
        return self._spec(merged)

    def drop_run_options_(self) -> None:
        """Drops the options that are about one run alone, in place: those of the base method and of overrides too."""
        self.options = _lasting(self.options)
        self.overrides = {glob: _lasting(settings) for glob, settings in self.overrides.items()}

    @property
    def needs_batches(self) -> str | None:
        """Why batches are needed, in words, or None where they are not."""
        if self.method in PTQ_METHODS and not PTQ_METHODS[self.method].data_free:
            return f"method {self.method!r} reads the inputs of the layers"
        if self.method in PTQ_METHODS and PTQ_METHODS[self.method].data_free_ranges:
            return None
        if any(spec.act_bits is not None and spec.act_range == "static" for spec in self._specs()):
            return "act_bits with static ranges is calibrated on them (act_range='dynamic' is not)"
        return None


def _lasting(options: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in options.items() if name not in OF_THE_RUN}
    return {name: _lasting(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def check_options(spec: LayerSpec) -> None:
    """Raises TypeError for an option that the method does not have, ValueError for a value that it refuses."""
    in_encoder = spec.method in ENCODERS
    holder = ENCODERS[spec.method].options if in_encoder else PTQ_METHODS[spec.method].options
    function = PTQ_METHODS[spec.method].run if holder is None else holder
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    known += [] if in_encoder else SHARED
    unknown = sorted(set(spec.options) - set(known))
    if unknown:
        raise TypeError(
            f"method {spec.method!r} has no option {', '.join(unknown)}; its options are: {', '.join(known) or 'none'}"
        )
    shared = {} if in_encoder else {k: v for k, v in spec.options.items() if k in SHARED}
    FloatPasses(**shared)
    if holder is None:
        check_values(spec.options)
    else:
        holder(**{k: v for k, v in spec.options.items() if k not in shared})
