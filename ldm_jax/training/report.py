"""What a finished run on drawn scenes is worth: the oracle's tables, in the work directory and on the screen."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import paths
from ldm_jax.config import WorkDir
from ldm_jax.evaluation.comparison import Comparison, compare, format_comparison
from ldm_jax.evaluation.obedience import bicubic, fresh_examples, scores, shuffled, total_variation
from ldm_jax.evaluation.oracle import format_table, score_table
from ldm_jax.evaluation.prompt_accuracy import choose_guidance, prompt_accuracy
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.model_directory import Params
from ldm_jax.stages import FirstStage, pasted, to_uint8
from ldm_jax.training.autoencoder import reconstructions
from ldm_jax.training.inputs import scenes

Example = dict[str, Any]


def reconstruction_table(config: ConfigDict, stage: FirstStage, params: Params) -> dict[str, Any]:
    """The oracle's table on reconstructions of scenes that were not trained on."""
    data = config.data
    examples = fresh_examples(data.resolution, config.evaluate.prompts, data.counts, "all", data.seed + 1_000_000)
    images = np.stack([e["image"] for e in examples])
    return score_table(reconstructions(stage, params, images), [e["text"] for e in examples])


def report_prompts(config: ConfigDict, workdir: WorkDir, model: LatentDiffusion) -> None:
    """Chooses the guidance scale, makes it the model's default, and leaves the oracle's table as `oracle.json` and on the screen."""
    group, counts, resolution = config.evaluate, config.data.counts, config.data.resolution
    draw: Any = partial(_draw, model)
    best, means = choose_guidance(draw, group.guidance, group.guidance_prompts, counts, resolution)
    table = prompt_accuracy(draw, best, group.prompts, group.held_out, counts, resolution)
    model.info["sample"]["guidance"] = best
    paths.write_json(workdir.path / "oracle.json", {"guidance": best, "all_by_guidance": means, "table": table})
    print(f"guidance {best:g}, chosen on other prompts (share all correct by scale: { {k: round(v, 3) for k, v in means.items()} })")
    print(format_table(table), flush=True)


def _draw(model: LatentDiffusion, *, prompts: list[str], guidance: float, seed: int) -> np.ndarray:
    return model.sample(prompts=prompts, guidance=guidance, seed=seed)


def report(config: ConfigDict, workdir: WorkDir, model: LatentDiffusion, source: Any) -> None:
    """Whether each condition is obeyed: `obedience.json`, after a text's `oracle.json` with the best guidance, which becomes the model's.

    `source` is the training's, for what is made of its examples.
    """
    conditions = [name for name in model.inputs if name != "image"]
    if conditions == ["text"]:
        report_prompts(config, workdir, model)
    tables = {name: obedience(config, model, source, name) for name in conditions or [""]}
    paths.write_json(workdir.path / "obedience.json", tables)
    for name, comparisons in tables.items():
        for against, table in comparisons.items():
            print(f"{name or 'no condition'}, against {against}\n{format_comparison(table)}", flush=True)


def obedience(config: ConfigDict, model: LatentDiffusion, source: Any, condition: str) -> dict[str, Comparison]:
    """Scenes drawn under their conditions, held against those drawn under the conditions of other scenes (and against simpler ways); the
    scenes themselves are the ceiling, but of PSNR the first stage's reconstructions of them."""
    examples = _examples(config, source, held_out=config.evaluate.held_out if condition == "text" else 0)
    images = np.stack([example["image"] for example in examples])
    score = partial(scores, condition, examples=examples)
    drawn, ceiling = _drawn(model, examples, examples), score(images)
    if "psnr" in ceiling:
        reconstructed = np.asarray(to_uint8(jnp.asarray(model.decode(model.encode(images)))))
        ceiling["psnr"] = score(_pasted(reconstructed, examples))["psnr"]
    others: dict[str, np.ndarray] = {}
    if condition == "low_res":
        others = {"bicubic interpolation": np.stack([bicubic(example["low_res"], images.shape[1]) for example in examples])}
    elif not condition:
        others = {"noise": np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)}
        spread = total_variation(drawn, config.data.counts, "seen")
        print(f"total variation from the frequencies of scenes: { {k: round(v, 3) for k, v in spread.items()} }")
    if condition:
        others = {"conditions of other scenes": _drawn(model, shuffled(examples), examples), **others}
    return {name: compare(score(drawn), score(other), ceiling) for name, other in others.items()}


def _examples(config: ConfigDict, source: Any, held_out: int) -> list[Example]:
    """`evaluate.prompts` scenes that training has not seen, with what the training's source makes of its own.

    After them come `held_out` of one object, of a pair of colour and shape that training has not seen either.
    """
    number = config.evaluate.prompts
    examples = [*map(scenes(config, source, number), range(number))]
    if held_out and 1 in config.data.counts:
        examples += map(scenes(config, source, held_out, "held_out"), range(held_out))
    return examples


def _drawn(model: LatentDiffusion, shown: Sequence[Example], examples: Sequence[Example]) -> np.ndarray:
    """Images drawn under the conditions of the examples that are shown; of a hole only the surroundings are theirs."""
    inputs: dict[str, Any] = {name: [example[name] for example in (examples if name == "mask" else shown)] for name in model.inputs}
    return _pasted(model.sample(**inputs, num=len(examples), seed=2), examples)


def _pasted(images: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
    """Images with the examples' own pixels outside of their holes, where they have one."""
    if "mask" not in examples[0]:
        return images
    return pasted(images, *(np.stack([example[name] for example in examples]) for name in ("image", "mask")))
