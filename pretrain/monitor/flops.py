"""Peak dense matrix throughput of common accelerators, the denominator of MFU (PaLM, arXiv 2204.02311, appendix B).

Vendors print figures with 2:4 sparsity beside or instead of the dense ones; every figure here is dense. A device that
is not in the table has no MFU: a guessed peak would make a wrong figure look measured.
"""

from __future__ import annotations

import re

# Name pattern -> TFLOP/s by number format. "fp32" is true single precision (TF32 off, PyTorch's default for matrix
# products); an absent format is one the device has no units for. First match wins.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA B200: HGX/DGX B200 datasheet, one eighth of the system, halved where it is given with sparsity.
    (r"\bB200\b", {"bf16": 2250.0, "fp16": 2250.0, "tf32": 1125.0, "fp32": 75.0}),
    # NVIDIA H200 Tensor Core GPU datasheet: SXM and NVL.
    (r"\bH200\b.*\bNVL\b", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    (r"\bH200\b", {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67.0}),
    # NVIDIA H100 Tensor Core GPU datasheet: NVL, PCIe and SXM.
    (r"\bH100\b.*\bNVL\b", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    (r"\bH100\b.*\bPCIe\b", {"bf16": 756.5, "fp16": 756.5, "tf32": 378.0, "fp32": 51.0}),
    (r"\bH100\b.*\b(SXM5?|HBM3)\b", {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67.0}),
    # NVIDIA A100 Tensor Core GPU datasheet: the same for SXM and PCIe, 40 and 80 GB.
    (r"\bA100\b", {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    # NVIDIA L40S datasheet.
    (r"\bL40S\b", {"bf16": 362.05, "fp16": 362.05, "tf32": 183.0, "fp32": 91.6}),
    # NVIDIA A10 datasheet. The A10G of a cloud is another chip configuration without a public datasheet.
    (r"\bA10\b", {"bf16": 125.0, "fp16": 125.0, "tf32": 62.5, "fp32": 31.2}),
    # NVIDIA Ada architecture whitepaper, appendix A (GeForce RTX 4090, with FP32 accumulation).
    (r"\bRTX 4090\b(?! (D|Laptop)\b)", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    # NVIDIA V100 and V100S datasheets; Volta has neither bf16 nor TF32 units.
    (r"\bV100S\b", {"fp16": 130.0, "fp32": 16.4}),
    (r"\bV100\b.*\bSXM[23]\b", {"fp16": 125.0, "fp32": 15.7}),
    (r"\bV100\b.*\bPCIE\b", {"fp16": 112.0, "fp32": 14.0}),
    # AMD Instinct MI300X datasheet (matrix figures).
    (r"\bMI300X\b", {"bf16": 1307.4, "fp16": 1307.4, "tf32": 653.7, "fp32": 163.4}),
    # AMD Instinct MI250X datasheet, halved: PyTorch sees each of the two dies as a device. ROCm names the slower MI250
    # "MI250X / MI250" as well.
    (r"\bMI250X\b", {"bf16": 191.5, "fp16": 191.5, "fp32": 47.85}),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The dense matrix peak of one device in FLOP/s, or None when it is not known.

    ``device_name`` is what ``torch.cuda.get_device_name()`` says; ``dtype`` is ``"bf16"``, ``"fp16"``, ``"tf32"`` or
    ``"fp32"``. A slice of a device (MIG) is unknown, as are CPUs.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, teraflops in _PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return teraflops[dtype] * 1e12 if dtype in teraflops else None
    return None
