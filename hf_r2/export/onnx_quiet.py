"""What torch and transformers say on every export, whatever the model, kept off the screen; all else is let through."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

STEPS = "[torch.onnx]"  # how the lines begin that torch.onnx prints of its steps
NOISE = {  # logger: how its messages begin
    "torch.onnx._internal.exporter._registration": (
        "torchvision is not installed. Skipping",
        "Failed to infer the signature for function",  # of transformers' own translations
    ),
    "transformers.exporters.utils": ("OnnxExporter is experimental",),
}


@contextmanager
def without_noise() -> Iterator[None]:
    """Inside, known messages do not show; torch.onnx and onnxscript warn of their own deprecated calls."""
    filters = {logging.getLogger(name): _Known(starts) for name, starts in NOISE.items()}
    printed = io.StringIO()
    for logger, known in filters.items():
        logger.addFilter(known)
    try:
        with warnings.catch_warnings(), redirect_stdout(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, known in filters.items():
            logger.removeFilter(known)
        sys.stdout.writelines(line for line in printed.getvalue().splitlines(True) if not line.startswith(STEPS))


class _Known(logging.Filter):
    """Drops the messages that begin with one of `starts`."""

    def __init__(self, starts: tuple[str, ...]):
        super().__init__()
        self.starts = starts

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a message is to be shown."""
        return not record.getMessage().startswith(self.starts)
