"""A whole offline evaluation: samples drawn or opened, a reference, metrics, tables and the report."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import config as configs
from ldm_jax.config import UserError, WorkDir
from ldm_jax.data.latents import weights_fingerprint
from ldm_jax.evaluation import draw, job, report, tables, told
from ldm_jax.evaluation.data_pictures import DataPictures
from ldm_jax.evaluation.job import Outcome, Reference, Tools
from ldm_jax.evaluation.obedience import SEED
from ldm_jax.evaluation.pictures import Pictures, open_pictures
from ldm_jax.evaluation.protocol import CENTRAL, CROP
from ldm_jax.latent_diffusion import LatentDiffusion, load_model
from ldm_jax.model_directory import find_model
from ldm_jax.paths import resolve
from ldm_jax.training.inputs import open_pictures_alone, open_source, scenes

NUMBER = 50_000  # samples, as published numbers have
_SHOWN, _SHOWN_LARGE, _LARGE, _COLUMNS = 64, 24, 128**2, 8  # samples in the grid, fewer where they have many pixels
_OPTIONS: tuple[str, ...] = (
    "steps",
    "sampler",
    "eta",
    "spacing",
    "seed",
    "batch_size",
    "guidance_kind",
    "guidance_interval",
    "guidance_rescale",
)
_OPTIONS += ("guidance_parallel", "guidance_radius", "guidance_momentum")


_READ_FIELDS = re.compile(r"--config\.(data|conditioning)\.|--config\.(seed|first_stage\.path)=")
# Flags that have an effect on what is evaluated, besides those that always have one.
SAMPLES = ("samples", "paired", "prompts_file")
FIRST_STAGE = ("model", "num", "reconstructions", "step", "ema", "dtype")
DRAWN = (*FIRST_STAGE, "prompts_file", "labels", "sweep", "guidance", *_OPTIONS)
WRITTEN = ("write_reference",)
_OF_A_KIND = {*SAMPLES, *DRAWN, *WRITTEN}


def check_effect(args: Any, acting: Collection[str], why: str) -> None:
    """Raises UserError for a flag that is given and has no effect; `acting` are those that have."""
    for name in sorted(_OF_A_KIND - set(acting)):
        if getattr(args, name) not in (None, False, "auto"):
            raise UserError(f"--{name.replace('_', '-')} has no effect here: {why}")


def configuration(args: Any, overrides: Sequence[str]) -> ConfigDict | None:
    """That of --config, or of the run in --model, with what the command line changes; None where there is neither. Raises UserError."""
    if args.samples and args.reference and (args.config or overrides):
        raise UserError("--config has no effect here: --samples are held against --reference")
    if args.config:
        return configs.from_command(args.config, list(overrides))
    if idle := [text for text in overrides if not _READ_FIELDS.match(text)]:
        raise UserError(f"{idle[0]} has no effect on an evaluation, which reads a configuration's data and conditions")
    if args.model and (run := WorkDir(args.model)).config.exists():
        return configs.overridden(configs.from_flat(run.stored()), list(overrides))
    if overrides:
        raise UserError(f"{overrides[0]} changes a configuration, and there is none: give --config, or a work directory as --model")
    return None


def crop_rule(data: Mapping[str, Any]) -> str:
    """How a configuration's `data` group makes squares of its pictures."""
    return f"random windows of {data['min_window']:g} of the short side and more" if data["min_window"] else CENTRAL


def stored_data(model: str) -> dict[str, Any] | None:
    """The `data` group that the run in a work directory was trained with; None where it is no work directory."""
    run = WorkDir(model)
    return configs.from_flat(run.stored()).data.to_dict() if run.config.exists() else None


def data_reference(config: ConfigDict, workdir: WorkDir, number: int | None, directory: Path) -> Reference:
    """The pictures of a configuration's data as training sees them. Raises UserError."""
    source = open_pictures_alone(config, workdir)
    named = {name: config.data[name] for name in ("source", "path", "name", "split", "resolution") if config.data[name]}
    pictures = DataPictures(source, {**named, CROP: crop_rule(config.data), "jpegs": 0}, number, config.data.workers)
    if hasattr(source, "name"):
        pictures.provenance["jpegs"] = sum(source.name(i).lower().endswith((".jpg", ".jpeg")) for i in pictures.indices.tolist())
    return Reference(pictures, None, {"pictures": pictures.describe(), **pictures.provenance}, directory)


def reference_of(args: Any, overrides: Sequence[str], directory: Path) -> Reference | None:
    """What the command line holds samples against: --reference, else the configuration's data; None for neither. Raises UserError."""
    features = directory / "features" / "reference"
    if args.reference:
        if args.reference_num:
            raise UserError("--reference-num is of a configuration's data; all of --reference is measured")
        return job.open_reference(args.reference, features, (args.crop, args.crop) if args.crop else None)
    config = configuration(args, overrides)
    if config is None:
        return None
    return data_reference(config, WorkDir(directory), args.reference_num, features)


class Evaluation:
    """One job, by its flags (those of `ldm_jax.evaluate`); `load` reads a model as `ldm_jax.load` does.

    Raises UserError, at construction and in `run`, for what does not go together.
    """

    def __init__(
        self,
        args: Any,
        overrides: Sequence[str],
        tools: Tools,
        prompts: Sequence[str] | None,
        sweep: tuple[str, Sequence[float]],
        command: Sequence[str],
        load: Callable[..., LatentDiffusion],
    ) -> None:
        self.load = load
        self.args, self.tools, self.prompts, self.sweep, self.command = args, tools, prompts, sweep, command
        self.overrides = overrides
        self.output = resolve(args.output)
        self.config = configuration(args, overrides)
        self.options = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
        if args.guidance:
            self.options["guidance"] = args.guidance[0]
        if sweep[0] in self.options:
            raise UserError(f"--{sweep[0].replace('_', '-')} and --sweep {sweep[0]}=... : give one of the two")
        if args.model and self._of_first_stage:
            check_effect(args, FIRST_STAGE, "a first stage reconstructs pictures")

    def run(self, output: Path) -> list[str]:
        """Does the job and writes the report; returns it for the screen."""
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {output}: {error.strerror or error}; choose another --output") from error
        found = self._samples() if self.args.samples else self._first_stage() if self._of_first_stage else self._drawn()
        if jax.process_index() == 0:
            written = report.make(
                found.title, self.command, found.described, found.reference, found.settings, found.outcome, self.tools, **found.more
            )
            report.write(output, written, found.pictures)
        return report.lines(found.outcome)

    @property
    def _of_first_stage(self) -> bool:
        return self.args.reconstructions or self.model.denoiser is None

    @cached_property
    def model(self) -> LatentDiffusion:
        args = self.args
        if args.reconstructions and args.step is None and args.ema is None:
            return load_model(find_model(args.model), args.dtype)
        return self.load(args.model, args.step, args.ema, args.dtype)

    @cached_property
    def reference(self) -> Reference | None:
        return reference_of(self.args, self.overrides, self.output)

    def _result(self, title: str, samples: Pictures, settings: Mapping[str, Any], outcome: Outcome, **more: Any) -> SimpleNamespace:
        captions = more.pop("captions", None)
        number = min(_SHOWN if samples.size[0] * samples.size[1] <= _LARGE else _SHOWN_LARGE, len(samples))
        shown: dict[str, Any] = {"samples": samples.read(0, number), "columns": _COLUMNS}
        if captions:
            shown["captions"] = list(captions[: len(shown["samples"])])
        if outcome.neighbors:
            shown["neighbors"] = outcome.neighbors
        run = resolve(self.args.model) if self.args.model else None
        return SimpleNamespace(
            title=title,
            described={
                "pictures": samples.describe(),
                "number": len(samples),
                "size": list(samples.size),
                "provenance": {name: value for name, value in samples.provenance.items() if name not in ("index", "caption")},
            },
            reference=self.reference.described if self.reference else None,
            settings=settings,
            outcome=outcome,
            pictures=shown,
            more={"tables": outcome.tables, "curves": report.curves(run) if run else [], **more},
        )

    def _samples(self) -> SimpleNamespace:
        """Pictures that are there."""
        args = self.args
        samples = open_pictures(args.samples)
        if args.paired:
            if self.reference is None:
                raise UserError("--paired holds samples against originals: give --reference or --config")
            outcome = job.paired(self.tools, samples, self.reference, self.output / "features")
            return self._result(f"Reconstructions {args.samples}", samples, {}, outcome)
        if self.prompts is not None and len(self.prompts) != len(samples):
            raise UserError(f"{len(self.prompts)} prompts in {args.prompts_file} for {len(samples)} samples: one each, in their order")
        outcome = job.compare(self.tools, samples, self.reference, self.output / "features", self.prompts)
        return self._result(f"Samples {args.samples}", samples, {"quantisation": "as it was found"}, outcome, captions=self.prompts)

    def _first_stage(self) -> SimpleNamespace:
        """The model's autoencoder on the reference's pictures; drawn scenes are ones that it has not seen."""
        seen = []
        if not self.args.reference and self.config is not None:
            config = self.config
            known = stored_data(self.args.model)
            if config.data.source == "shapes":
                config = configs.overridden(config, [f"--config.data.seed={SEED}"])
            elif known and all(known[name] == config.data[name] for name in ("source", "path", "name", "split")):
                seen = ["these are the pictures that the autoencoder was trained on: give others with --reference or --config.data.path"]
            self.reference = data_reference(config, WorkDir(self.output), self.args.num or NUMBER, self.output / "features" / "reference")
        elif self.args.num:
            raise UserError("--num is of a configuration's data; all pictures of --reference are reconstructed")
        if (reference := self.reference) is None:
            raise UserError("a first stage is evaluated on pictures: give --reference or --config")
        made, outcome = job.reconstructions(self.tools, self.model, reference, self.output, weights_fingerprint(self.model.params))
        outcome.warnings += seen
        settings = {"latents": "the mode", "quantisation": report.QUANTISATION, **draw.described(self.model)}
        return self._result(f"First stage of {self.args.model}", made, settings, outcome)

    def _drawn(self) -> SimpleNamespace:
        """Samples of the model, for each value of a sweep, of which the report shows the best."""
        parameter, values = self.sweep
        number = self.args.num or NUMBER
        examples, about = self._told(number)
        runs = [({**self.options, parameter: value}, self.output / "sweep" / f"{parameter}={value:g}") for value in values]
        drawn = [self._draw(examples, about, number, *run) for run in runs or [(self.options, self.output)]]
        best, by = _best([outcome for _, outcome in drawn]) if values else (0, "")
        samples, outcome = drawn[best]
        options = (runs or [(self.options, self.output)])[best][0]
        sweep = report.swept(parameter, values, [outcome for _, outcome in drawn]) if values else None
        settings = {**draw.settings(self.model, options), "EMA": self.args.ema or "the first", "told": about}
        settings["quantisation"] = report.QUANTISATION
        if values:
            settings["chosen"] = f"{parameter}={values[best]:g} of the sweep, by {by}"
        captions = self._captions(examples, min(number, _SHOWN))
        return self._result(f"Samples of {self.args.model}", samples, settings, outcome, captions=captions, sweep=sweep)

    def _draw(self, examples: told.Told, about: Any, number: int, options: Mapping[str, Any], directory: Path) -> tuple[Pictures, Outcome]:
        draw.draw(self.model, examples, number, options, directory / "samples", about)
        samples = open_pictures(directory / "samples")
        if (data := stored_data(self.args.model)) is not None:
            samples.provenance = {**samples.provenance, CROP: crop_rule(data)}
        features = self.output / "features" / ("" if directory == self.output else directory.name)
        captions = self._captions(examples, number) if self.tools.clip else None
        outcome = job.compare(self.tools, samples, self.reference, features, captions)
        if {"low_res", "mask"} & set(self.model.inputs):
            truth = DataPictures(_Told(examples, number, about), {}, None, 1)
            job.add_pair_scores(outcome, self.tools, samples, truth, features)
        self._obeyed(outcome, examples, samples)
        return samples, outcome

    def _obeyed(self, outcome: Outcome, examples: told.Told, samples: Pictures) -> None:
        """Adds what the oracle reads in samples of drawn scenes."""
        if self.config is None or self.config.data.source != "shapes" or self.prompts is not None:
            return
        number = min(tables.READ, len(samples))
        images, shown = samples.read(0, number), [examples(i) for i in range(number)]
        if self._told_classes_alone:
            outcome.tables.append(tables.by_class(images, [int(example["label"]) for example in shown]))
            return
        metrics, found = tables.obeyed(self.model.inputs, images, shown)
        outcome.metrics += metrics
        outcome.tables += found

    @property
    def _told_classes_alone(self) -> bool:
        """Classes by their numbers, of no scene."""
        return self.model.inputs == ("label",) and self.args.labels != "data"

    def _captions(self, examples: told.Told, number: int) -> list[str] | None:
        """Of each sample, where the model is told texts."""
        if "text" not in self.model.inputs:
            return None
        return [examples(i)["text"] for i in range(number)]

    def _told(self, number: int) -> tuple[told.Told, Any]:
        """What sample i is told, and a description of it. Raises UserError."""
        inputs = self.model.inputs
        if self.prompts is not None:
            if inputs != ("text",):
                raise UserError(f"--prompts-file is for models of text alone; this one takes {', '.join(inputs) or 'nothing'}")
            digest = sha256("\n".join(self.prompts).encode()).hexdigest()
            return told.prompts(self.prompts), {"prompts": len(self.prompts), "SHA-256": digest}
        if self.args.labels and not (inputs == ("label",) or (self.args.labels == "data" and "label" in inputs)):
            raise UserError(f"--labels is for models of a class alone; this one takes {', '.join(inputs) or 'nothing'}")
        if not inputs:
            return (lambda i: {}), "nothing"
        if self._told_classes_alone:
            classes, seed = draw.classes_of(self.model), self.options.get("seed", self.model.info["sample"]["seed"])
            if self.args.labels == "random":
                return told.at_random(classes, seed), f"random classes of {classes}, by seed {seed}"
            return told.balanced(classes), f"balanced classes of {classes}"
        if self.config is None:
            raise UserError(f"this model is told {', '.join(inputs)}: give a configuration whose data have them (--config)")
        source = open_source(self.config, WorkDir(self.args.model))
        if self.config.data.source == "shapes":
            what = [source.fingerprint(), SEED, self.config.seed, list(self.config.data.counts), self.config.data.resolution]
            return scenes(self.config, source, number), {"scenes": "that training has not seen", "of": what}
        examples = told.FromData(source)
        return examples.__getitem__, f"the data's own: {examples.fingerprint()}"


class _Told:
    """What samples were told, as a source: of small pictures and of holes, with the pictures themselves."""

    def __init__(self, examples: told.Told, number: int, about: Any) -> None:
        self._examples, self._number, self._about = examples, number, about

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> Any:
        return self._examples(index)

    def fingerprint(self) -> str:
        return str(self._about)


def _best(outcomes: Sequence[Outcome]) -> tuple[int, str]:
    """The outcome of a sweep with the least of the first metric that all have and of which less is better, and that metric's name."""
    named = [{metric.name: metric for metric in outcome.metrics} for outcome in outcomes]
    for name, metric in named[0].items():
        if metric.better == "lower" and all(name in other for other in named):
            return int(np.argmin([other[name].value for other in named])), name
    return 0, "nothing that all have"
