"""A whole offline evaluation: samples drawn or opened, a reference, metrics, tables and the report."""

from collections.abc import Callable, Mapping, Sequence
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
from ldm_jax.evaluation import draw, job, report, told
from ldm_jax.evaluation.data_pictures import DataPictures
from ldm_jax.evaluation.job import Outcome, Reference, Tools
from ldm_jax.evaluation.obedience import SEED, scores
from ldm_jax.evaluation.oracle import METRICS, score_table
from ldm_jax.evaluation.pictures import Pictures, open_pictures
from ldm_jax.evaluation.protocol import CROP
from ldm_jax.evaluation.scores import Metric
from ldm_jax.latent_diffusion import LatentDiffusion, load_model
from ldm_jax.model_directory import find_model
from ldm_jax.training.inputs import open_source, scenes

NUMBER = 50_000  # samples, as published numbers have
_SHOWN, _SHOWN_LARGE, _LARGE, _COLUMNS = 64, 24, 128**2, 8  # samples in the grid, fewer where they have many pixels
_READ = 2000  # samples that the oracle reads, at some 30 ms each
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


def configuration(args: Any, overrides: Sequence[str]) -> ConfigDict | None:
    """That of --config, or of the run in --model, with what the command line changes; None where there is neither. Raises UserError."""
    if args.config:
        return configs.from_command(args.config, list(overrides))
    if args.model and (run := WorkDir(args.model)).config.exists():
        return configs.overridden(configs.from_flat(run.stored()), list(overrides))
    if overrides:
        raise UserError(f"{overrides[0]} changes a configuration, and there is none: give --config, or a work directory as --model")
    return None


def crop_rule(config: ConfigDict) -> str:
    """How the training of a configuration makes squares of its pictures."""
    if config.data.min_window:
        return f"random windows of {config.data.min_window:g} of the short side and more"
    return "the central square, resized as ADM does"


def data_reference(config: ConfigDict, workdir: WorkDir, number: int | None, directory: Path) -> Reference:
    """The pictures of a configuration's data as training sees them. Raises UserError."""
    plain = ConfigDict(config.to_dict())
    plain.data.buckets = ()
    for group in plain.conditioning.values():
        group.enabled = False  # the pictures alone
    source = open_source(plain, workdir)
    named = {name: config.data[name] for name in ("source", "path", "name", "split", "resolution") if config.data[name]}
    pictures = DataPictures(source, {**named, CROP: crop_rule(config)}, number, config.data.workers)
    return Reference(pictures, None, {"pictures": pictures.describe(), **pictures.provenance}, directory)


def reference_of(args: Any, overrides: Sequence[str], directory: Path) -> Reference | None:
    """What the command line holds samples against: --reference, else the configuration's data; None for neither. Raises UserError."""
    features = directory / "features" / "reference"
    if args.reference:
        return job.open_reference(args.reference, features, (args.crop, args.crop) if args.crop else None)
    if args.crop:
        raise UserError("--crop is of the pictures of --reference; those of a configuration have data.resolution")
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
        self.output = Path(args.output)
        self.config = configuration(args, overrides)
        self.options = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
        if args.guidance:
            self.options["guidance"] = args.guidance[0]
        if args.samples and self.options:
            raise UserError(f"--{next(iter(self.options)).replace('_', '-')} says how a --model is sampled; the samples are there already")

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
        run = Path(self.args.model) if self.args.model else None
        return SimpleNamespace(
            title=title,
            described={"pictures": samples.describe(), "number": len(samples), "size": list(samples.size), **samples.provenance},
            reference=self.reference.described if self.reference else None,
            settings=settings,
            outcome=outcome,
            pictures=shown,
            more={"curves": report.curves(run) if run else [], **more},
        )

    def _samples(self) -> SimpleNamespace:
        """Pictures that are there."""
        args = self.args
        samples = open_pictures(args.samples)
        if args.num:
            raise UserError("--num is of samples that are drawn; all of --samples are measured")
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
        reference = self.reference
        if not self.args.reference and self.config is not None:
            config, seen = self.config, []
            if config.data.source == "shapes":
                config = configs.overridden(config, [f"--config.data.seed={SEED}"])
            elif not self.args.config and not self.overrides:
                seen = ["these are the pictures that the autoencoder was trained on: give others with --reference or --config.data.path"]
            reference = data_reference(config, WorkDir(self.output), self.args.num or NUMBER, self.output / "features" / "reference")
        elif self.args.num:
            raise UserError("--num is of a configuration's data; all pictures of --reference are reconstructed")
        else:
            seen = []
        if reference is None:
            raise UserError("a first stage is evaluated on pictures: give --reference or --config")
        self.__dict__["reference"] = reference
        made, outcome = job.reconstructions(self.tools, self.model, reference, self.output, weights_fingerprint(self.model.params))
        outcome.warnings += seen
        settings = {"latents": "the mode", "quantisation": report.QUANTISATION, "updates of training": self.model.info.get("step")}
        return self._result(f"First stage of {self.args.model}", made, settings, outcome)

    def _drawn(self) -> SimpleNamespace:
        """Samples of the model, for each value of a sweep, of which the report shows the best."""
        parameter, values = self.sweep
        number = self.args.num or NUMBER
        examples, about = self._told(number)
        runs = [({**self.options, parameter: value}, self.output / "sweep" / f"{parameter}={value:g}") for value in values]
        drawn = [self._draw(examples, about, number, *run) for run in runs or [(self.options, self.output)]]
        best = _best([outcome for _, outcome in drawn]) if values else 0
        samples, outcome = drawn[best]
        options = (runs or [(self.options, self.output)])[best][0]
        more: dict[str, Any] = {"tables": self._tables(examples, samples)}
        if values:
            more["sweep"] = report.swept(parameter, values, [outcome for _, outcome in drawn])
        settings = {**draw.settings(self.model, options), "told": about, "quantisation": report.QUANTISATION}
        if values:
            settings["chosen"] = f"{parameter}={values[best]:g} of the sweep, by {_CHOSEN_BY}"
        captions = self._captions(examples, number)
        return self._result(f"Samples of {self.args.model}", samples, settings, outcome, captions=captions, **more)

    def _draw(self, examples: told.Told, about: Any, number: int, options: Mapping[str, Any], directory: Path) -> tuple[Pictures, Outcome]:
        draw.draw(self.model, examples, number, options, directory / "samples", about)
        samples = open_pictures(directory / "samples")
        if self.config is not None:
            samples.provenance = {**samples.provenance, CROP: crop_rule(self.config)}
        features = self.output / "features" / ("" if directory == self.output else directory.name)
        outcome = job.compare(self.tools, samples, self.reference, features, self._captions(examples, number))
        if {"low_res", "mask"} & set(self.model.inputs):
            truth = DataPictures(_Told(examples, number, about), {}, None, 1)
            outcome.metrics = job.pair_scores(self.tools, samples, truth, features, []) + outcome.metrics
        outcome.metrics += self._obeyed(examples, samples)
        return samples, outcome

    @property
    def _read_by_oracle(self) -> bool:
        return self.config is not None and self.config.data.source == "shapes" and self.prompts is None

    def _obeyed(self, examples: told.Told, samples: Pictures) -> list[Metric]:
        """The first thing to know of each condition, where the oracle can read the samples."""
        if not self._read_by_oracle or self._told_classes_alone:
            return []
        number = min(_READ, len(samples))
        images, shown = samples.read(0, number), [examples(i) for i in range(number)]
        found = []
        for name in [name for name in self.model.inputs if name != "image"] or [""]:
            title = _FIRST[name]
            values = scores(name, images, shown)[title]
            values = values[~np.isnan(values)]
            if len(values):
                error = float(values.std() / np.sqrt(len(values)))
                found.append(Metric(f"{name or 'scenes'}: {title}", float(values.mean()), len(values), None, "oracle", "higher", error))
        return found

    @property
    def _told_classes_alone(self) -> bool:
        """Classes by their numbers, of no scene."""
        return self.model.inputs == ("label",) and self.args.labels != "data"

    def _captions(self, examples: told.Told, number: int) -> list[str] | None:
        """Of each sample, where the model is told texts; a class's number where it is told these."""
        if "text" not in self.model.inputs:
            return None
        return [examples(i)["text"] for i in range(number)]

    def _told(self, number: int) -> tuple[told.Told, Any]:
        """What sample i is told, and a description of it. Raises UserError."""
        inputs = self.model.inputs
        if not inputs:
            return (lambda i: {}), "nothing"
        if self.prompts is not None:
            if inputs != ("text",):
                raise UserError(f"--prompts-file is for models of text alone; this one takes {', '.join(inputs)}")
            digest = sha256("\n".join(self.prompts).encode()).hexdigest()
            return told.prompts(self.prompts), {"prompts": len(self.prompts), "SHA-256": digest}
        if self._told_classes_alone:
            classes, seed = draw.classes_of(self.model), self.model.info["sample"]["seed"]
            made = told.balanced(classes) if self.args.labels == "balanced" else told.at_random(classes, seed)
            return made, f"{self.args.labels} classes of {classes}"
        if self.config is None:
            raise UserError(f"this model is told {', '.join(inputs)}: give a configuration whose data have them (--config)")
        source = open_source(self.config, WorkDir(self.args.model))
        if self.config.data.source == "shapes":
            return scenes(self.config, source, number), "scenes that training has not seen"
        examples = told.FromData(source)
        return examples.__getitem__, f"the data's own: {examples.fingerprint()}"

    def _tables(self, examples: told.Told, samples: Pictures) -> list[dict[str, Any]]:
        """What the oracle reads in samples of drawn scenes: is each condition obeyed?"""
        if not self._read_by_oracle:
            return []
        number = min(_READ, len(samples))
        images, shown = samples.read(0, number), [examples(i) for i in range(number)]
        if self._told_classes_alone:
            return [_by_class(images, [int(example["label"]) for example in shown])]
        tables = [_scores(name, images, shown) for name in self.model.inputs if name != "image"] or [_scores("", images, shown)]
        if "text" in self.model.inputs:
            tables.append(_by_factor(images, [example["text"] for example in shown]))
        return tables


# Of the oracle's scores of each condition, the one that says most.
_FIRST = {"text": "all seen", "label": "class", "boxes": "iou", "segmentation": "pixels", "low_res": "all", "mask": "object"}
_FIRST |= {"neighbors": "nearer", "": "valid"}


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


_CHOSEN_BY = "the first metric of which less is better"


def _best(outcomes: Sequence[Outcome]) -> int:
    """The outcome of a sweep with the least of the first metric that all have and of which less is better."""
    named = [{metric.name: metric for metric in outcome.metrics} for outcome in outcomes]
    for name, metric in named[0].items():
        if metric.better == "lower" and all(name in other for other in named):
            return int(np.argmin([other[name].value for other in named]))
    return 0


def _scores(name: str, images: np.ndarray, examples: Sequence[Any]) -> dict[str, Any]:
    found = scores(name, images, examples)
    rows = []
    for title, values in found.items():
        known = values[~np.isnan(values)]
        if len(known):
            rows.append([title, float(known.mean()), float(known.std() / np.sqrt(len(known))), len(known)])
    title = f"Is {name} obeyed, as the oracle reads it" if name else "Valid scenes, as the oracle reads them"
    return {"title": title, "columns": ["score", "mean", "standard error", "n"], "rows": rows}


def _by_class(images: np.ndarray, labels: Sequence[int]) -> dict[str, Any]:
    """Of samples that were told a class alone: is the largest object of it?"""
    found = scores("label", images, [{"label": label, "boxes": np.zeros((1, 5))} for label in labels])
    told_of, names = np.array(labels), ("class", "color", "shape")
    rows: list[list[Any]] = [["all", len(labels), *(float(found[name].mean()) for name in names)]]
    for label in np.unique(told_of):
        own = told_of == label
        rows.append([int(label), int(own.sum()), *(float(found[name][own].mean()) for name in names)])
    return {"title": "Classes, as the oracle reads the largest object", "columns": ["class", "n", *names], "rows": rows}


def _by_factor(images: np.ndarray, captions: Sequence[str]) -> dict[str, Any]:
    table = score_table(images, captions)
    rows = [[name, *(row.get(metric) for metric in ("n", *METRICS))] for name, row in table.items()]
    return {"title": "Prompts, by the number of objects", "columns": ["objects", "n", *METRICS], "rows": rows}
