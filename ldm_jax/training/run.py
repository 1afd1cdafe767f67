"""A whole run: first stage, latents, denoiser, table and model, each skipped where it is already complete."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax import config as configs
from ldm_jax import paths
from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError, WorkDir
from ldm_jax.data.latents import LatentCache, weights_fingerprint
from ldm_jax.data.sources import Source
from ldm_jax.evaluation.oracle import format_table
from ldm_jax.latent_diffusion import LatentDiffusion, load_first_stage
from ldm_jax.model_directory import Params, find_model, read_info
from ldm_jax.nn.autoencoder import Autoencoder
from ldm_jax.sharding.mesh import check_batch, make_mesh, on_host
from ldm_jax.sharding.processes import exchange, from_first
from ldm_jax.stages import FirstStage, abstract_params, build_autoencoder, build_denoiser, compute_dtype
from ldm_jax.training import init_from, loop, optimizer
from ldm_jax.training.autoencoder import AutoencoderStage
from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.training.diffusion import DiffusionStage, build_loss, build_sampling, caption, conditioning_for, denoiser_group, model_info
from ldm_jax.training.encode import MEASURED, Encoder, ensure_cache, latent_scale, latent_statistics
from ldm_jax.training.held_out import AutoencoderEvaluation, DenoiserEvaluation
from ldm_jax.training.inputs import check_examples, open_source
from ldm_jax.training.report import reconstruction_table, report
from ldm_jax.training.text_cache import Embedded, with_embeddings

logger = logging.getLogger(__name__)
_TOKENIZER_CAPTIONS = 50_000


def run(config: ConfigDict, workdir: WorkDir, command: list[str]) -> WorkDir:
    """Trains what `config.task` says in `workdir`, from wherever it stopped, and leaves `model/`. Raises as `loop.train`."""
    check_same(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, slices=config.mesh.slices)
    check_batches(config, mesh)
    workdir.check(config)
    source = open_source(config, workdir)
    check_components(config, workdir, source)
    from_first(lambda: workdir.claim(config, command, versions()))
    compilation_cache.set_cache_dir(str(paths.absolute(workdir.path / "compilation_cache")))
    compilation_cache.reset_cache()  # whatever was compiled before, without a directory, has turned it off
    if is_complete(workdir, config.train.steps):
        return workdir
    if config.task == "autoencoder":
        train_first_stage(config, workdir, source, mesh)
    else:
        train_denoiser(config, workdir, source, ensure_first_stage(config, workdir, mesh, command), mesh)
    return workdir


def is_complete(workdir: WorkDir, steps: int) -> bool:
    """Whether the run in `workdir` has left the model of at least `steps` updates. Raises UserError where `model.json` is damaged."""
    return from_first(lambda: (workdir.model / "model.json").exists() and read_info(workdir.model).get("step", 0) >= steps)


def check_same(config: ConfigDict) -> None:
    """Raises UserError where processes of a run have other configurations or versions: each would train something else."""
    said = exchange({**configs.flat(config), **versions()})
    for process, other in enumerate(said):
        for name in sorted({*said[0], *other}):
            if said[0].get(name) != other.get(name):
                raise UserError(
                    f"process {process} of {len(said)} has {name}={other.get(name)}, and process 0 {name}={said[0].get(name)}: start all"
                    " with the same command, code and packages"
                )


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")}


def check_batches(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError where a batch of one of the stages does not split over the mesh."""
    check_batch(config.train.batch_size, mesh, config.train.accumulation)
    if config.task == "diffusion" and not config.first_stage.path and config.first_stage.kind != "identity":
        check_batch(config.first_stage.train.batch_size, mesh, config.first_stage.train.accumulation)


def check_components(config: ConfigDict, workdir: WorkDir, source: Source) -> None:
    """Builds, abstractly, what the run will need, so that a wrong setting is found before anything is written. Raises UserError."""
    dtype = compute_dtype(config.train.dtype)
    first = first_stage_workdir(config, workdir)
    inner = configs.first_stage_run(config) if config.task == "diffusion" else config
    if first is not None and config.first_stage.kind != "identity" and not is_complete(first, inner.train.steps):
        if config.task == "diffusion" and _latents_of(workdir).exists():
            raise UserError(
                f"first_stage.train.steps={inner.train.steps} would train the first stage in {workdir.path} further, under a denoiser"
                " that has learnt its present latents: choose another --workdir, or the steps of before"
            )
        stage = AutoencoderStage(inner, source)
        if init_from.starts(inner, first):
            init_from.check_autoencoder(inner.train.init_from, stage.network)
    if config.task == "diffusion":
        if first is None:
            model = find_model(config.first_stage.path)
            given = fitting_first_stage(config, model)[0]
            check_scale(config, workdir, model, given)
            autoencoder = given.network
        else:
            autoencoder = build_autoencoder(config.first_stage.to_dict(), dtype)
        check_denoiser(config, workdir, source, autoencoder)


def check_denoiser(config: ConfigDict, workdir: WorkDir, source: Source, autoencoder: Autoencoder) -> None:
    """Raises UserError where stage 2 cannot be built as it is set, its conditions go nowhere, or the data has nothing for one of them."""
    dtype, text = compute_dtype(config.train.dtype), config.conditioning.text
    starts = init_from.starts(config, workdir)
    tokenizer = None
    if text.enabled and starts:
        tokenizer = init_from.initial_tokenizer(config)
    elif text.enabled and text.tokenizer != "train" and not (workdir.path / "tokenizer.json").exists():
        tokenizer = Tokenizer.pretrained(text.tokenizer, text.max_length)
    conditioning = conditioning_for(config, autoencoder, tokenizer)
    denoiser = build_denoiser(denoiser_group(config), config.diffusion, conditioning, autoencoder.latent_channels, dtype)
    build_loss(config.diffusion, denoiser.process)
    build_sampling(config.sample, denoiser)
    optimizer.from_config(config.optimizer, config.train.steps)
    try:
        params = abstract_params(FirstStage(autoencoder), denoiser, config.data.resolution)
    except ValueError as error:
        raise UserError(f"denoiser: {error}") from error
    if starts:
        init_from.check_denoiser(config.train.init_from, denoiser, params)
    check_examples(source, conditioning)


def first_stage_workdir(config: ConfigDict, workdir: WorkDir) -> WorkDir | None:
    """Where this run trains its first stage; None where it takes another's."""
    if config.task == "autoencoder":
        return workdir
    return None if config.first_stage.path else workdir.first_stage


def ensure_first_stage(config: ConfigDict, workdir: WorkDir, mesh: Mesh, command: list[str]) -> Any:
    """The model directory of a diffusion run's first stage: another's (`first_stage.path`), or its own, trained now if need be."""
    own = first_stage_workdir(config, workdir)
    if own is None:
        return find_model(config.first_stage.path)
    inner = configs.first_stage_run(config)
    if not is_complete(own, inner.train.steps):
        from_first(lambda: own.claim(inner, command, versions()))
        train_first_stage(inner, own, open_source(inner, workdir), mesh)
    return own.model


def fitting_first_stage(config: ConfigDict, model: Any) -> tuple[FirstStage, Params]:
    """The first stage in a model directory, for this run's pictures. Raises UserError."""
    stage, params = load_first_stage(model, compute_dtype(config.train.dtype))
    configs.check_resolution(config, stage.network.factor)
    return stage, params


def encode(config: ConfigDict, workdir: WorkDir) -> LatentCache:
    """The latent cache of a run whose first stage is complete. Raises UserError."""
    if config.task != "diffusion":
        raise UserError("a latent cache belongs to a diffusion run (task=diffusion)")
    check_same(config)
    first_stage, params = fitting_first_stage(config, find_model(config.first_stage.path or str(workdir.first_stage.path)))
    source = open_source(config, workdir)
    return ensure_cache(config, workdir, Encoder(first_stage, params, config.data.encode_batch), source)


def has_scale(model: Any) -> bool:
    """Whether the latents of a first stage have a scale of their own: the paper's files of an autoencoder alone say none."""
    info = read_info(model)
    return info["task"] != "autoencoder" or info.get("origin", {}).get("format") != "compvis"


def check_scale(config: ConfigDict, workdir: WorkDir, model: Any, stage: FirstStage) -> None:
    """Raises UserError where another scale is asked for than that of the first stage in `model`. A denoiser that has begun has its own."""
    asked = config.first_stage.latent_scale
    if asked in MEASURED or _latents_of(workdir).exists() or not has_scale(model):
        return
    if any(stage.shift) or not np.allclose(stage.scale, 1.0 / float(asked), rtol=1e-4):
        factors = ", ".join(f"{1.0 / scale:g}" for scale in stage.scale)
        shifted = f" after a shift by {', '.join(f'{-shift:g}' for shift in stage.shift)}" if any(stage.shift) else ""
        raise UserError(
            f"first_stage.latent_scale={asked}, but the first stage in {model} multiplies its latents by {factors}{shifted}: take these by"
            " first_stage.latent_scale=std"
        )


def train_first_stage(config: ConfigDict, workdir: WorkDir, source: Source, mesh: Mesh) -> None:
    """Stage 1 to its end: weights, latent statistics, model."""
    weights = _first_stage_weights(config, workdir, source, mesh)
    from_first(lambda: _leave_first_stage(config, workdir, source, *weights))


def _leave_first_stage(config: ConfigDict, workdir: WorkDir, source: Source, network: Autoencoder, params: Params, step: int) -> None:
    """Latent statistics and model of a trained stage 1."""
    raw = FirstStage(network)
    encoder = Encoder(raw, params, config.data.encode_batch)
    mean, std = latent_statistics(encoder, source, config.first_stage.statistics_examples, config.data.workers)
    shift, scale = latent_scale(config.first_stage.latent_scale, mean, std)
    info = {
        "task": "autoencoder",
        "step": step,
        "resolution": config.data.resolution,
        "latent_mean": mean.tolist(),
        "latent_std": std.tolist(),
    }
    if config.data.source == "shapes":
        info["reconstruction_oracle"] = reconstruction_table(config, raw, params)
        print("oracle on reconstructions of fresh scenes\n" + format_table(info["reconstruction_oracle"]), flush=True)
    LatentDiffusion(FirstStage(network, shift, scale), None, {"first_stage": params}, info).save(workdir.model)


def _first_stage_weights(config: ConfigDict, workdir: WorkDir, source: Source, mesh: Mesh) -> tuple[Autoencoder, Params, int]:
    """The network of stage 1, its (EMA) weights, and the updates behind them. Pixels as latents have none to train."""
    if config.first_stage.kind == "identity":
        return build_autoencoder(config.first_stage.to_dict(), compute_dtype(config.train.dtype)), {}, config.train.steps
    stage = AutoencoderStage(config, source)
    if init_from.starts(config, workdir):
        init_from.start_autoencoder(stage, config.train.init_from)
    if config.evaluate.every:
        stage.evaluation = AutoencoderEvaluation(config, workdir, source, stage.frozen)
    state = loop.train(stage, workdir, mesh)
    return stage.network, stage.autoencoder(on_host(state.ema[str(config.ema.decays[0])])), int(state.step)


def ensure_tokenizer(config: ConfigDict, workdir: WorkDir, source: Source | LatentCache) -> Tokenizer | None:
    """The run's tokenizer: stored in the work directory, so that a resumed run has the same."""
    text = config.conditioning.text
    if not text.enabled:
        return None
    path = workdir.path / "tokenizer.json"
    starts = init_from.starts(config, workdir)

    def settle() -> str:
        if path.exists() and not starts:
            return Tokenizer.load(path, text.max_length).to_json()
        if starts:
            tokenizer = init_from.initial_tokenizer(config)
        elif text.tokenizer == "train":
            captions = (caption(source, i) for i in range(min(len(source), _TOKENIZER_CAPTIONS)))
            tokenizer = Tokenizer.train(captions, text.vocab_size, text.max_length)
        else:
            tokenizer = Tokenizer.pretrained(text.tokenizer, text.max_length)
        paths.write_bytes(path, tokenizer.to_json().encode())
        return tokenizer.to_json()

    return Tokenizer.from_json(from_first(settle), text.max_length)


def learnt_latents(workdir: WorkDir, stage: FirstStage, weights: str, latents: Mapping[str, Any]) -> FirstStage:
    """The first stage, of fingerprint `weights`, with the scale of the `latents` that the denoiser in `workdir` has learnt.

    Raises UserError where they are those of another first stage.
    """
    if latents["first_stage"] != weights:
        raise UserError(
            f"the denoiser in {workdir.path} has learnt the latents of another first stage: give that one, or choose another --workdir"
        )
    return replace(stage, shift=tuple(latents.get("shift", stage.shift)), scale=tuple(latents.get("scale", stage.scale)))


def _latents_of(workdir: WorkDir) -> Any:
    """Says which latents the denoiser learns, by the weights of their first stage, their shift and scale; written before it begins."""
    return workdir.path / "latents_of.json"


def settle_latents(config: ConfigDict, workdir: WorkDir, source: Source, model: Any, stage: FirstStage, encoder: Encoder) -> FirstStage:
    """The first stage with the scale that the denoiser learns its latents in, for good: its own, or where it has none what
    `first_stage.latent_scale` asks for. Raises as `learnt_latents`."""

    def settle() -> dict[str, Any]:
        if _latents_of(workdir).exists():
            return json.loads(_latents_of(workdir).read_text())
        shift, scale = stage.shift, stage.scale
        if not has_scale(model):
            kind, mean, std = config.first_stage.latent_scale, np.zeros(1), np.ones(1)
            if kind in MEASURED:
                mean, std = latent_statistics(encoder, source, config.first_stage.statistics_examples, config.data.workers)
            shift, scale = latent_scale(kind, mean, std)
        latents = {"first_stage": encoder.fingerprint, "shift": shift, "scale": scale}
        paths.write_json(_latents_of(workdir), latents)
        return latents

    return learnt_latents(workdir, stage, encoder.fingerprint, from_first(settle))  # told: who looks too soon may not see the file yet


def train_denoiser(config: ConfigDict, workdir: WorkDir, source: Source, model: Any, mesh: Mesh) -> None:
    """Latents of the first stage in the directory `model`, stage 2, the oracle's table, the model."""
    first_stage, params = fitting_first_stage(config, model)
    encoder = Encoder(first_stage, params, config.data.encode_batch)
    first_stage = settle_latents(config, workdir, source, model, first_stage, encoder)
    tokenizer = ensure_tokenizer(config, workdir, source)
    starts = init_from.starts(config, workdir)
    data: Source | LatentCache | Embedded = source
    if config.data.cache:
        data = latents = ensure_cache(config, workdir, encoder, source)
        if config.conditioning.text.enabled and config.conditioning.text.frozen:
            conditioning = conditioning_for(config, first_stage.network, tokenizer)
            data = with_embeddings(config, workdir, conditioning, latents, starts)
    del encoder  # and with it the first stage on every device
    stage = DiffusionStage(config, first_stage, params, data, tokenizer)
    if starts:
        init_from.start_denoiser(stage, config.train.init_from)
    if config.evaluate.every:
        stage.evaluation = DenoiserEvaluation(config, workdir, source, stage.loss)
    state = loop.train(stage, workdir, mesh)
    averaged, info = on_host(state.ema[str(config.ema.decays[0])]), model_info(config, int(state.step))
    from_first(lambda: _leave_model(config, workdir, stage.model(averaged, info), source))


def _leave_model(config: ConfigDict, workdir: WorkDir, trained: LatentDiffusion, source: Source) -> None:
    if config.data.source == "shapes":
        report(config, workdir, trained, source)
    trained.save(workdir.model)


def restore_model(path: str, step: int | None = None, ema: str | None = None, dtype: str = "auto") -> LatentDiffusion:
    """A diffusion work directory's model at a checkpoint, by the EMA of a given decay (default: the first). Raises UserError."""
    workdir = WorkDir(path)
    if not workdir.config.exists():
        raise UserError(f"{path} is neither a model directory nor a work directory: it has no model.json and no config.json")
    config = configs.from_flat(workdir.stored())
    if config.task != "diffusion":
        raise UserError(f"{path} is the work directory of an autoencoder; its model is loaded without a step, once it is complete")
    config.train.dtype = dtype
    first = find_model(config.first_stage.path or str(workdir.first_stage.path))
    first_stage, first_stage_params = load_first_stage(first, compute_dtype(dtype))
    weights, file = weights_fingerprint(first_stage_params), _latents_of(workdir)
    latents = json.loads(file.read_text()) if file.exists() else {"first_stage": weights}  # of a run that has none, the first stage's own
    first_stage = learnt_latents(workdir, first_stage, weights, latents)
    text = config.conditioning.text
    if not workdir.checkpoints.exists():
        raise UserError(f"{path} has no checkpoint yet")
    tokenizer = Tokenizer.load(workdir.path / "tokenizer.json", text.max_length) if text.enabled else None
    stage = DiffusionStage(config, first_stage, first_stage_params, [], tokenizer)  # type: ignore[arg-type]
    with Checkpoints(workdir.checkpoints, config.checkpoint.every, read_only=True) as checkpoints:
        if checkpoints.latest() is None:
            raise UserError(f"{path} has no checkpoint yet")
        state = checkpoints.restore(loop.abstract_state(stage, make_mesh()), step)
    decay = ema or str(config.ema.decays[0])
    if decay not in state.ema:
        raise UserError(f"{path} has no EMA of decay {decay}; it has {', '.join(state.ema)}")
    return stage.model(on_host(state.ema[decay]), model_info(config, int(state.step)))
