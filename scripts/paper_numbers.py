"""The numbers of the tables of the range loss's papers (arXiv:2303.08253, and its DSMM version: tables 1 to 6)."""

from __future__ import annotations

BASELINE, HEAVY, FIXED, PAPER = "baseline", "heavy L2", "DSMM alpha=10 fixed", "DSMM"
AWARE = "size-aware (not in the paper)"


def _rows(
    columns: tuple[str, ...], lines: dict[tuple[str, str], tuple[float, ...]]
) -> dict[tuple[str, str, str], float]:
    """(model, training, column) to the paper's number."""
    return {
        (*row, column): value for row, values in lines.items() for column, value in zip(columns, values, strict=True)
    }


V1, V2, R18, R50, R101 = "MobileNet-V1", "MobileNet-V2", "ResNet-18", "ResNet-50", "ResNet-101"
TITLES = {
    1: "Post-training quantization, W4A8, top-1 %",
    2: "Transformer-base, English to German, 8-bit weights per tensor, BLEU",
    3: "PD-Quant, W2A8, top-1 %",
    4: "Post-training quantization of ResNets, W4A8, top-1 %",
    5: "Trained quantized, all layers, top-1 %",
    6: "MobileBERT on QNLI clustered by DKM, accuracy %",
}
TABLES: dict[int, dict[tuple[str, str, str], float]] = {
    1: _rows(("FP32", "Naive", "DFQ", "AdaRound", "SQuant", "PD-Quant"), {
        (V1, BASELINE): (74.12, 2.67, 54.06, 70.42, 63.85, 71.87),
        (V1, HEAVY): (72.67, 13.41, 57.68, 69.23, 66.51, 69.86),
        (V1, FIXED): (74.21, 8.52, 42.48, 69.71, 67.23, 71.92),
        (V1, PAPER): (73.95, 44.24, 59.21, 71.35, 67.86, 72.39),
        (V2, BASELINE): (73.08, 2.57, 56.56, 71.29, 59.30, 71.54),
        (V2, HEAVY): (71.00, 4.17, 0.09, 68.06, 57.30, 68.92),
        (V2, FIXED): (72.80, 13.77, 56.19, 70.79, 62.16, 71.27),
        (V2, PAPER): (72.81, 36.69, 51.46, 71.77, 67.16, 71.98),
    }),
    2: _rows(("FP32", "Naive"), {
        ("Transformer-base", BASELINE): (28.2, 2.9),
        ("Transformer-base", PAPER): (27.9, 27.8),
    }),
    3: _rows(("PD-Quant",), {
        (V1, BASELINE): (47.62,), (V2, BASELINE): (50.66,), (R50, BASELINE): (62.92,), (R101, BASELINE): (66.50,),
        (V1, PAPER): (54.20,), (V2, PAPER): (57.53,), (R50, PAPER): (69.31,), (R101, PAPER): (71.24,),
    }),
    4: _rows(("FP32", "AdaRound", "SQuant", "PD-Quant"), {
        (R50, BASELINE): (78.04, 74.73, 74.68, 76.60),
        (R50, PAPER): (78.22, 75.61, 75.75, 77.21),
        (R101, BASELINE): (79.45, 75.18, 75.23, 78.16),
        (R101, PAPER): (79.63, 76.71, 77.20, 78.49),
    }),
    5: _rows(("FP32", "PACT 2W2A", "LSQ 2W2A", "PACT 4W4A", "LSQ 4W4A"), {
        (R18, BASELINE): (69.76, 51.97, 58.33, 66.90, 69.90),
        (R18, PAPER): (69.84, 55.64, 62.47, 68.36, 69.45),
    }),
    6: _rows(("FP32", "DKM 1 bit", "DKM 2 bits"), {
        ("MobileBERT", BASELINE): (90.41, 61.34, 80.12),
        ("MobileBERT", PAPER): (90.83, 61.49, 80.87),
    }),
}  # fmt: skip
# Figure 3 gives no numbers: DKM by bits, and bits / dims, of ResNet-18 and MobileNet-V1.
CLUSTERINGS = ("DKM 1 bit", "DKM 2 bits", "DKM 4 bits", "DKM 2 bits / 2 dims", "DKM 4 bits / 4 dims")
