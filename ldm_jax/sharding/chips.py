"""What accelerators can do, by their vendors' data sheets: the roofs that MFU, fits and estimated step times are measured against."""

import re
from dataclasses import dataclass

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One JAX device. That is a whole chip, but for v7x, whose chips show as two devices each: its row is half a chip.

    Attributes:
      name: as in a topology ("v5e:16x16"), or the vendor's.
      pattern: of `jax.Device.device_kind`, for `re.search`.
      peak_bf16: dense bf16 operations a second, a multiply-add counting two.
      hbm_bytes: capacity; a runtime keeps some of it (libtpu 0.25 GiB of v5e's 16).
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s that leave it for the others of its slice (ICI) or host (NVLink): all links, one direction.
      dcn_bandwidth: bytes/s that leave it for other slices or hosts: its share of its host's network cards, one direction.
    """

    name: str
    pattern: str
    peak_bf16: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float


# The first row whose pattern is found decides; cards of the same name with other memory, power or links (PCIe, NVL, a part of one by MIG)
# have none. Capacities that data sheets give in "GB" are binary ones in fact. TPUs: the pages of
# cloud.google.com/tpu/docs, where ICI is given for both directions and the network for a chip, a host or a pod. GPUs: NVIDIA's data sheets,
# bf16 without sparsity, NVLink given for both directions, and a network card for each GPU as in NVIDIA's own DGX, which others may lack.
CHIPS = (
    # tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1200 GB/s; 6 links of 45 GB/s, network 25 GB/s a host of 4: jax-ml.github.io/scaling-book
    Chip("v4", r"TPU v4$", 275e12, 32 * _GIB, 1200e9, 270e9, 6.25e9),
    # tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s, ICI 400 GB/s both ways, network 6.4 Tbit/s a pod of 256
    Chip("v5e", r"TPU v5 ?lite|TPU v5e", 197e12, 16 * _GIB, 819e9, 200e9, 3.125e9),
    # tpu/docs/v5p: 459 TFLOP/s, 95 GiB, 2765 GB/s, ICI 1200 GB/s both ways, network 50 Gbit/s
    Chip("v5p", r"TPU v5", 459e12, 95 * _GIB, 2765e9, 600e9, 6.25e9),
    # tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1638 GB/s, ICI 800 GB/s both ways, network 4 x 200 Gbit/s a host of 8
    Chip("v6e", r"TPU v6", 918e12, 32 * _GIB, 1638e9, 400e9, 12.5e9),
    # tpu/docs/tpu7x: 2307 TFLOP/s, 192 GiB, 7380 GB/s, ICI 1200 GB/s both ways, network 100 Gbit/s; here of one of a chip's two devices
    Chip("v7x", r"TPU ?v?7x", 1153.5e12, 96 * _GIB, 3690e9, 300e9, 6.25e9),
    # A100 data sheet: 312 TFLOP/s, 80 GB of 2039 GB/s or 40 GB of 1555 GB/s, NVLink 600 GB/s; DGX A100: 200 Gbit/s a GPU
    Chip("A100-80GB", r"A100-SXM\d?-80GB", 312e12, 80 * _GIB, 2039e9, 300e9, 25e9),
    Chip("A100-40GB", r"A100-SXM\d?-40GB", 312e12, 40 * _GIB, 1555e9, 300e9, 25e9),
    # H100 data sheet, SXM: 989 TFLOP/s, 80 GB, 3.35 TB/s, NVLink 900 GB/s; DGX H100: 400 Gbit/s a GPU
    Chip("H100", r"\bH100( 80GB HBM3| SXM\d?)?$", 989e12, 80 * _GIB, 3350e9, 450e9, 50e9),
    # H200 data sheet, SXM: 989 TFLOP/s, 141 GB, 4.8 TB/s, NVLink 900 GB/s; DGX H200: 400 Gbit/s a GPU. 140 GiB is what the driver shows.
    Chip("H200", r"\bH200( SXM\d?)?$", 989e12, 140 * _GIB, 4800e9, 450e9, 50e9),
    # DGX B200 data sheet, an eighth of it: 2250 TFLOP/s, 180 GB, 8 TB/s, NVLink 1800 GB/s, 400 Gbit/s. 179 GiB is what the driver shows.
    Chip("B200", r"\bB200( SXM\d?)?$", 2250e12, 179 * _GIB, 8000e9, 900e9, 50e9),
)


def find_chip(device_kind: str) -> Chip | None:
    """The row of a device by its `jax.Device.device_kind`; None where there is none."""
    return next((chip for chip in CHIPS if re.search(chip.pattern, device_kind)), None)
