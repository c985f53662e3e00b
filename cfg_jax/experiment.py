"""From a config to objects: the only reader of configs."""

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax

from cfg_jax import schema, train_step
from cfg_jax.data import datasets, images
from cfg_jax.diffusion import guidance, logsnr, losses, samplers, schedules
from cfg_jax.models import network as networks
from cfg_jax.types import Array, Guidance, Network, Params, Sampler, Schedule, UsageError


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, how wide, and how often to tell. Raises UsageError for numbers out of range."""

    steps: int = 10_000
    batch_size: int = 128  # global, over all devices and processes
    seed: int = 0  # of the parameters, the data's order and every draw
    fsdp: int = 1  # devices that share one copy of the state; 1 is plain data parallelism
    accumulate: int = 1  # parts of the batch that a device takes one after the other
    # In what gradients are summed over devices. A float32 sum is the same over 8 chips and 256, to
    # its rounding; "bfloat16" halves what crosses for layers that compute in bfloat16.
    gradient_dtype: str = "float32"
    read_threads: int = 2  # that make batches ahead
    read_processes: int = 0  # that do so, each with read_threads; 0: this one
    log_every: int = 100
    checkpoint_every: int = 1000
    keep: int = 2  # checkpoints
    sample_every: int = 0  # steps between sample grids; 0 for none
    sample_w: tuple[float, ...] = (0.0, 1.0, 4.0)

    def __post_init__(self):
        for name in ("sample_every", "read_processes"):
            if getattr(self, name) < 0:
                raise UsageError(f"train.{name}={getattr(self, name)}: 0 for none, or more.")
        counts = ("steps", "batch_size", "fsdp", "accumulate", "log_every", "checkpoint_every")
        for name in (*counts, "keep", "read_threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"train.{name}={getattr(self, name)}: must be at least 1.")
        if self.gradient_dtype not in ("float32", "bfloat16"):
            raise UsageError(
                f"train.gradient_dtype={self.gradient_dtype!r}: must be 'float32' or 'bfloat16'."
            )
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"train.seed={self.seed}: must lie in 0 to 2^32 - 1.")
        if self.sample_every and not self.sample_w:
            raise UsageError("train.sample_w is empty: give a w, or train.sample_every=0.")
        for w in self.sample_w:
            guidance.check_w(w)


@dataclasses.dataclass(frozen=True)
class Sample:
    """The reverse chain: which rule and sampler, over which noise levels.

    Raises UsageError for numbers out of range.
    """

    guidance: dict[str, Any] = dataclasses.field(default_factory=dict)
    sampler: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Labels to move away from in place of the null one; several are mixed, a pass of each.
    negative: tuple[int, ...] = ()
    grid: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 256  # T, noise levels
    clip: bool = True  # x to [-1, 1], after mixing
    batch_size: int = 128  # images at a time, over all devices

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"sample.{name}={getattr(self, name)}: must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """A small sweep of the EMA during training. Raises UsageError for numbers out of range."""

    every: int = 0  # steps between sweeps; 0 for none
    w: tuple[float, ...] = (0.0, 1.0)
    num_samples: int = 1000  # a w
    seed: int = 0
    features: str = "judge"  # as the flags of `evaluate` of these names
    judge: str | None = None
    reference: str | None = None
    keep_best: str | None = None  # a score, as "fd_judge": the EMA that has the best one is kept

    def __post_init__(self):
        if self.every < 0 or self.num_samples < 2:
            raise UsageError(
                f"evaluate.every={self.every}: 0 for none, or more; "
                f"evaluate.num_samples={self.num_samples}: 2 or more."
            )
        if not self.w:
            raise UsageError("evaluate.w is empty: give a w, or evaluate.every=0.")
        for w in self.w:
            guidance.check_w(w)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The objects of a config, wired. Building it computes nothing and reads no data."""

    config: Mapping[str, Any]  # complete
    dataset: Any
    network: Network
    dtypes: Callable[[], Params]  # in which precision the network reads each parameter
    features: Network | None  # a classifier's, before its last affine map; the same parameters
    schedule: Schedule
    reading: logsnr.Reading
    null_label: int | None  # None where no null row was trained
    teacher: "Experiment | None"  # of a student: the model that it learns to say guided
    loss: Callable  # (params, frozen, batch with uint8 images, key) -> (mean, metrics)
    optimizer: optax.GradientTransformation
    ema: train_step.Ema
    train: Train
    evaluate: Evaluate
    sample: Sample
    guidance: Callable[..., Guidance]  # w -> Guidance
    sampler: Sampler
    lams: Callable[[], Array]  # the noise levels of the chain, [T]

    @property
    def is_classifier(self) -> bool:
        return self.features is not None

    @property
    def w_range(self) -> tuple[float, float] | None:
        """The strengths that a student was told of; None for any other model."""
        loss = self.config["loss"]
        return (loss["w_min"], loss["w_max"]) if self.teacher else None


# Rules stand around rules: sample.guidance.rule is the one inside, and so on down.
RULES = tuple("sample.guidance" + depth * ".rule" for depth in range(5))

SCHEMA = schema.Schema(
    tables={
        "dataset": datasets.DATASETS,
        "model": networks.MODELS,
        "schedule": schedules.SCHEDULES,
        "loss": losses.LOSSES,
        "optimizer": train_step.OPTIMIZERS,
        **dict.fromkeys(RULES, guidance.GUIDANCE),
        "sample.sampler": samplers.SAMPLERS,
        "sample.grid": schedules.GRIDS,
    },
    sections={"ema": train_step.Ema, "train": Train, "evaluate": Evaluate, "sample": Sample},
    scalars={"reading": "eps"},
    names={
        "schedule": "cosine",
        "loss": "denoising",
        "optimizer": "adam",
        **dict.fromkeys(RULES, "classifier_free"),
        "sample.sampler": "ancestral",
        # The paper's. With few levels its steps are long at the ends: see docs/samplers.md.
        "sample.grid": "uniform_u",
    },
    bound={
        # What the data set, and the loss, decide.
        "model": {
            "rngs",
            "image_size",
            "in_channels",
            "out_channels",
            "num_classes",
            "null_row",
            "w_embedding",
        },
        # What the jobs' flag --w gives.
        **{path: {"w"} for path in RULES},
        "sample.grid": {"schedule", "steps"},
    },
)


def config_file(name: str) -> Path:
    """The file of an experiment: a path to a .py file, or the name of one in configs/.

    Raises UsageError where there is none.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UsageError(f"--config={name}: there is no such file.")
        return Path(name)
    package = Path(__file__).parent
    # In a wheel the configs are inside the package, in a checkout beside it.
    folder = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())
    known = {f.stem: f for f in folder.glob("*.py") if f.stem != "__init__"}
    if name not in known:
        raise schema.unknown("--config", name, known)
    return known[name]


def load_config(name: str) -> dict[str, Any]:
    """The dict that get_config() of an experiment's file returns.

    Raises UsageError for a file that is not there, fails, or has no get_config.
    """
    path = config_file(name)
    spec = importlib.util.spec_from_file_location(f"cfg_jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config().to_dict()
    except Exception as error:  # whatever a user's file does
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"--config={name}: {reason}") from error


def _options(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "name"}


def _module(model: Mapping[str, Any], told: Mapping[str, Any]) -> networks.Build:
    takes = inspect.signature(networks.MODELS[model["name"]]).parameters
    told = {name: value for name, value in told.items() if name in takes}
    return networks.make(model["name"], **_options(model), **told)


def rule(section: Mapping[str, Any], w: Any = 0.0) -> Guidance:
    """The rule of a complete section `guidance`, with its strength where the innermost one has it.

    w is a number, or one an image [B].
    """
    options = _options(section)
    if "rule" in options:
        inner = rule(options.pop("rule"), w)
        return guidance.GUIDANCE[section["name"]](inner, **options)
    return guidance.GUIDANCE[section["name"]](w, **options)


def check_pair(guided: Guidance, sampler: Sampler) -> None:
    """Raises UsageError for a rule that breaks the pair of x and eps where the sampler needs it."""
    if sampler.needs_pair and not guided.keeps_pair:
        able = [name for name, entry in samplers.SAMPLERS.items() if not entry.needs_pair]
        raise UsageError(
            f"guidance 'cfg_plus_plus' with sampler {type(sampler).__name__}: the rule re-adds "
            "another noise than its x leaves of z, and this sampler takes that one; DDIM takes the "
            f"eps that it is told. sample.sampler.name can be: {', '.join(able) or 'none here'}."
        )


def build(config: Mapping[str, Any]) -> Experiment:
    """The objects of a config. Raises UsageError for a field or value that is wrong, naming it."""
    config = SCHEMA.complete(config)
    dataset = datasets.DATASETS[config["dataset"]["name"]](**_options(config["dataset"]))
    loss = losses.LOSSES[config["loss"]["name"]](**_options(config["loss"]))
    schedule = schedules.SCHEDULES[config["schedule"]["name"]](**_options(config["schedule"]))
    reading = schema.entry("config.reading", logsnr.READINGS, config["reading"])
    # With p_uncond = 0 nothing trains a null row, so there is none to guide with.
    null_row = getattr(loss, "p_uncond", 0) > 0
    is_classifier = config["loss"]["name"] == "classification"
    if is_classifier != (config["model"]["name"] == "classifier"):
        raise UsageError(
            f"model.name={config['model']['name']!r} with loss.name={config['loss']['name']!r}: a "
            "classifier is trained by classification, and nothing else is."
        )
    is_student = config["loss"]["name"] == "distillation"
    if is_student != (config["sample"]["guidance"]["name"] == "distilled"):
        raise UsageError(
            f"loss.name={config['loss']['name']!r} with sample.guidance.name="
            f"{config['sample']['guidance']['name']!r}: a student, trained by distillation, has "
            "its guidance inside: it is sampled by 'distilled', and nothing else is."
        )
    teacher = None
    if is_student:  # the same network without w, trained as the paper's
        rule = {"guidance": {"name": "classifier_free"}}
        section = {"loss": {"name": "denoising"}, "sample": {**config["sample"], **rule}}
        teacher = build({**config, **section})
    height, size, channels = dataset.image_shape
    if height != size:
        raise UsageError(
            f"images of {dataset.name} are {height}x{size}: the networks want squares."
        )
    module = _module(
        config["model"],
        {
            "image_size": size,
            "in_channels": channels,
            "out_channels": channels,
            "num_classes": dataset.num_classes,
            "null_row": null_row or is_student,  # a student has all that its teacher has
            "w_embedding": is_student,
        },
    )
    make_network = functools.partial(
        networks.network, module, sinusoid_input=schedules.sinusoid_input
    )
    network = make_network()
    bound_loss = functools.partial(
        loss,
        network=network,
        schedule=schedule,
        reading=reading,
        null_label=dataset.num_classes,
        **({"teacher": teacher.network} if teacher else {}),
    )

    def loss_of_bytes(params, frozen, batch, key):
        return bound_loss(params, frozen, {**batch, "image": images.to_float(batch["image"])}, key)

    sample = Sample(**config["sample"])
    classes = dataset.num_classes
    if outside := [c for c in sample.negative if not 0 <= c < classes]:
        raise UsageError(f"sample.negative={outside}: the classes are 0 to {classes - 1}.")
    sampler = samplers.SAMPLERS[sample.sampler["name"]](**_options(sample.sampler))
    check_pair(rule(sample.guidance), sampler)
    lams = functools.partial(
        schedules.GRIDS[sample.grid["name"]], schedule, sample.steps, **_options(sample.grid)
    )
    jax.eval_shape(lams)  # raises what is wrong with the grid, and computes nothing
    return Experiment(
        config=config,
        dataset=dataset,
        network=network,
        dtypes=functools.partial(networks.dtypes, module),
        features=make_network(method="features") if is_classifier else None,
        schedule=schedule,
        reading=reading,
        null_label=dataset.num_classes if null_row else None,
        teacher=teacher,
        loss=loss_of_bytes,
        optimizer=train_step.OPTIMIZERS[config["optimizer"]["name"]](
            **_options(config["optimizer"])
        ),
        ema=train_step.Ema(**config["ema"]),
        train=Train(**config["train"]),
        evaluate=Evaluate(**config["evaluate"]),
        sample=sample,
        guidance=functools.partial(rule, sample.guidance),
        sampler=sampler,
        lams=lams,
    )
