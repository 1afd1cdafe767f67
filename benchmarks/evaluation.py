"""What an evaluation costs: statistics of features, the Fréchet distance, Inception beside torch-fidelity's, and memory.

    python -m benchmarks.evaluation                                 statistics and distance
    python -m benchmarks.evaluation --inception [--compare]         pictures a second, beside torch-fidelity (which needs torch)
    python -m benchmarks.evaluation --memory 1000 3000              peak memory of so many pictures of 256 px through Inception
    python -m benchmarks.evaluation --stream 50000                  the same through the reader and the accumulators alone

Weights are random: what is measured does not depend on them. Each figure of memory is of a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.evaluation.metrics import frechet_distance
from ldm_jax.evaluation.statistics import Moments

_SIDE, _BATCH = 256, 32


def timed(function: Callable[[], Any], repeats: int) -> float:
    """The median of so many runs, seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def sums(rows: int, width: int = 2048) -> None:
    """Mean and covariance in one pass, and the distance of two of them."""
    rng = np.random.default_rng(0)
    block = rng.gamma(0.5, 0.5, (512, width)).astype(np.float32)

    def accumulate() -> Moments:
        moments = Moments(width)
        for start in range(0, rows, len(block)):
            moments.add(block[: rows - start])
        return moments

    print(f"statistics of {rows} x {width} features: {timed(accumulate, 3):.2f} s")
    gaussians = [accumulate().gaussian() for _ in range(2)]
    noise = rng.normal(size=(4 * width, width)) * 0.1
    covs = [gaussians[0].cov + np.cov(noise[:: i + 1], rowvar=False) for i in range(2)]
    seconds = timed(lambda: frechet_distance(gaussians[0].mean, covs[0], gaussians[1].mean, covs[1]), 3)
    print(f"Fréchet distance of {width} features: {seconds:.2f} s")


def random_state() -> dict[str, np.ndarray]:
    """Weights by torch's names."""
    from ldm_jax.nn.inception import torch_shapes

    rng = np.random.default_rng(0)
    state = {}
    for name, shape in torch_shapes().items():
        values = np.ones(shape) if name.endswith(("bn.weight", "running_var")) else np.zeros(shape)
        if len(shape) > 1:
            values = rng.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5
        state[name] = values.astype(np.float32)
    return state


def inception(compare: bool, batch: int, repeats: int) -> None:
    """Pictures of 256 px a second, ours and torch-fidelity's in turns."""
    import jax

    from ldm_jax.evaluation.extractors import inception_of
    from ldm_jax.evaluation.features import on_mesh
    from ldm_jax.nn.inception import params_from_state_dict
    from ldm_jax.sharding.mesh import make_mesh

    images = np.random.default_rng(0).integers(0, 256, (batch, _SIDE, _SIDE, 3), np.uint8)
    function = on_mesh([inception_of(params_from_state_dict(random_state()))], make_mesh(devices=jax.local_devices()))
    runs: dict[str, Callable[[], Any]] = {"ldm_jax": lambda: function(images, batch)}
    if compare:
        runs["torch-fidelity"] = _theirs(images)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(timed(run, 1))
    rates = {name: batch / statistics.median(seconds) for name, seconds in times.items()}
    print(f"Inception, {_SIDE} px, batches of {batch}: " + ", ".join(f"{name} {rate:.2f} images/s" for name, rate in rates.items()))
    if compare:
        print(f"ratio {rates['ldm_jax'] / rates['torch-fidelity']:.2f}")


def _theirs(images: np.ndarray) -> Callable[[], Any]:
    import torch

    from benchmarks.fidelity import import_torch_fidelity

    make = import_torch_fidelity().feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        state = {name: torch.from_numpy(value) for name, value in random_state().items()}
        state |= {name.replace("weight", "num_batches_tracked"): torch.tensor(0) for name in state if name.endswith("bn.weight")}
        torch.save({**state, "fc.bias": torch.zeros(1008)}, file)
        network = make("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)).eval()
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def run() -> Any:
        with torch.no_grad():
            return network(pictures)

    return run


_EXTRACT = """
import sys, numpy as np, jax
from pathlib import Path
from benchmarks.evaluation import random_state, peak
from ldm_jax.evaluation.extractors import inception_of
from ldm_jax.evaluation.features import measure
from ldm_jax.evaluation.pictures import open_pictures
from ldm_jax.evaluation.scores import Side
from ldm_jax.nn.inception import params_from_state_dict
tool = inception_of(params_from_state_dict(random_state()))
side = Side(measure(open_pictures(sys.argv[1]), [tool], Path(sys.argv[2]), 32, "measure"))
side.gaussian("inception"), side.gaussian("inception_spatial")
print(peak())
"""
_STREAM = """
import sys
from benchmarks.evaluation import peak
from ldm_jax.evaluation.pictures import open_pictures
from ldm_jax.evaluation.statistics import Moments
import numpy as np
pictures, moments = open_pictures(sys.argv[1]), Moments(2048)
for start in range(0, len(pictures), 512):
    images = pictures.read(start, min(start + 512, len(pictures)))
    moments.add(images.reshape(len(images), -1)[:, :: images[0].size // 2048][:, :2048].astype(np.float32))
moments.gaussian()
print(peak())
"""


def peak() -> float:
    """The most memory that this process has had, GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("memory is measured on Linux alone")


def memory(numbers: list[int], program: str) -> None:
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "pictures.npz"
            write_pictures(file, number)
            command = [sys.executable, "-c", program, str(file), str(Path(folder) / "features")]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(f"{number} pictures of {_SIDE} px: peak {float(out):.2f} GiB", flush=True)


def write_pictures(file: Path, number: int) -> None:
    """Noise in ADM's form, a few pictures at a time."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (number, _SIDE, _SIDE, 3)}
        np.lib.format.write_array_header_2_0(member, header)  # type: ignore[arg-type]
        for start in range(0, number, 512):
            member.write(rng.integers(0, 256, (min(512, number - start), _SIDE, _SIDE, 3), np.uint8).tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--inception", action="store_true")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--batch", type=int, default=_BATCH)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", type=int, nargs="+", default=[])
    parser.add_argument("--stream", type=int, nargs="+", default=[])
    args = parser.parse_args()
    if args.inception:
        inception(args.compare, args.batch, args.repeats)
    memory(args.memory, _EXTRACT)
    memory(args.stream, _STREAM)
    if not (args.inception or args.memory or args.stream):
        sums(args.rows)


if __name__ == "__main__":
    main()
