import pytest

from ldm_jax.sharding.chips import CHIPS, find_chip


@pytest.mark.parametrize(
    ("kind", "name", "peak"),
    [
        ("NVIDIA B200", "B200", 2250e12),
        ("NVIDIA GB200", None, None),
        ("NVIDIA H200", "H200", 989e12),
        ("NVIDIA GH200 480GB", None, None),
        ("NVIDIA H200 NVL", None, None),
        ("NVIDIA H200 MIG 3g.71gb", None, None),
        ("NVIDIA H100", "H100", 989e12),
        ("NVIDIA H100 NVL", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA A100 80GB PCIe", None, None),
        ("NVIDIA A100-SXM-64GB", None, None),
        ("NVIDIA H100 80GB HBM3", "H100", 989e12),
        ("NVIDIA H100 PCIe", None, None),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB", 312e12),
        ("TPU v4", "v4", 275e12),
        ("TPU v5 lite", "v5e", 197e12),
        ("TPU v5e", "v5e", 197e12),
        ("TPU v5", "v5p", 459e12),
        ("TPU v5p", "v5p", 459e12),
        ("TPU v6 lite", "v6e", 918e12),
        ("TPU v6e", "v6e", 918e12),
        ("TPU7x", "v7x", 1153.5e12),
        ("cpu", None, None),
    ],
)
def test_a_device_is_found_by_its_kind(kind, name, peak):
    chip = find_chip(kind)
    assert (chip and chip.name, chip and chip.peak_bf16) == (name, peak)


def test_the_roofs_are_in_the_order_that_all_hardware_has():
    """Off-chip is slower than on-chip, and a ridge point lies where training hardware has it (80 to 700 operations a byte)."""
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    for chip in CHIPS:
        assert chip.hbm_bandwidth > chip.ici_bandwidth > chip.dcn_bandwidth > 1e9, chip
        assert 80 < chip.peak_bf16 / chip.hbm_bandwidth < 700 and 10e9 < chip.hbm_bytes < 300e9, chip
