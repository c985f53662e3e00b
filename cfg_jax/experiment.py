"""From a config to objects: the only reader of configs."""

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
    wandb: str = ""  # a project of Weights & Biases to log to as well

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
    grid: str = "uniform_u"
    steps: int = 256  # T, noise levels
    clip: bool = True  # x to [-1, 1], after mixing
    batch_size: int = 128  # images at a time, over all devices

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"sample.{name}={getattr(self, name)}: must be at least 1.")
        schema.entry("sample.grid", schedules.GRIDS, self.grid)


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
    null_label: int | None  # None where the network has no null row
    loss: Callable  # (params, frozen, batch with uint8 images, key) -> (mean, metrics)
    optimizer: optax.GradientTransformation
    ema: train_step.Ema
    train: Train
    sample: Sample
    guidance: Callable[..., Guidance]  # w -> Guidance
    sampler: Sampler
    lams: Callable[[], Array]  # the noise levels of the chain, [T]

    @property
    def is_classifier(self) -> bool:
        return self.features is not None


SCHEMA = schema.Schema(
    tables={
        "dataset": datasets.DATASETS,
        "model": networks.MODELS,
        "schedule": schedules.SCHEDULES,
        "loss": losses.LOSSES,
        "optimizer": train_step.OPTIMIZERS,
        "sample.guidance": guidance.GUIDANCE,
        "sample.sampler": samplers.SAMPLERS,
    },
    sections={"ema": train_step.Ema, "train": Train, "sample": Sample},
    scalars={"reading": "eps"},
    names={
        "schedule": "cosine",
        "loss": "denoising",
        "optimizer": "adam",
        "sample.guidance": "classifier_free",
        "sample.sampler": "ancestral",
    },
    bound={
        # What the data set, and the loss, decide.
        "model": {"rngs", "image_size", "in_channels", "out_channels", "num_classes", "null_row"},
        # What the jobs' flag --w gives.
        "sample.guidance": {"w"},
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


def build(config: Mapping[str, Any]) -> Experiment:
    """The objects of a config. Raises UsageError for a field or value that is wrong, naming it."""
    config = SCHEMA.complete(config)
    dataset = datasets.DATASETS[config["dataset"]["name"]](**_options(config["dataset"]))
    config["dataset"] |= dataset.described()
    loss = losses.LOSSES[config["loss"]["name"]](**_options(config["loss"]))
    schedule = schedules.SCHEDULES[config["schedule"]["name"]](**_options(config["schedule"]))
    reading = schema.entry("config.reading", logsnr.READINGS, config["reading"])
    # What nothing trains is not there: at p_uncond = 0 the null row, at 1 all labels.
    p_uncond = getattr(loss, "p_uncond", 0)
    null_row = 0 < p_uncond < 1
    is_classifier = config["loss"]["name"] == "classification"
    if is_classifier != (config["model"]["name"] == "classifier"):
        raise UsageError(
            f"model.name={config['model']['name']!r} with loss.name={config['loss']['name']!r}: a "
            "classifier is trained by classification, and nothing else is."
        )
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
            "out_channels": channels * reading.outputs,
            "num_classes": dataset.num_classes if p_uncond < 1 else None,
            "null_row": null_row,
        },
    )
    make_network = functools.partial(
        networks.network,
        module,
        sinusoid_input=getattr(schedule, "sinusoid_input", schedules.sinusoid_input),
    )
    network = make_network()
    bound_loss = functools.partial(
        loss,
        network=network,
        schedule=schedule,
        reading=reading,
        null_label=dataset.num_classes,
    )

    def loss_of_bytes(params, frozen, batch, key):
        return bound_loss(params, frozen, {**batch, "image": images.to_float(batch["image"])}, key)

    sample = Sample(**config["sample"])
    rule = guidance.GUIDANCE[sample.guidance["name"]]
    return Experiment(
        config=config,
        dataset=dataset,
        network=network,
        dtypes=functools.partial(networks.dtypes, module),
        features=make_network(method="features") if is_classifier else None,
        schedule=schedule,
        reading=reading,
        null_label=dataset.num_classes if null_row else None,
        loss=loss_of_bytes,
        optimizer=train_step.OPTIMIZERS[config["optimizer"]["name"]](
            **_options(config["optimizer"])
        ),
        ema=train_step.Ema(**config["ema"]),
        train=Train(**config["train"]),
        sample=sample,
        guidance=functools.partial(rule, **_options(sample.guidance)),
        sampler=samplers.SAMPLERS[sample.sampler["name"]](**_options(sample.sampler)),
        lams=functools.partial(schedules.GRIDS[sample.grid], schedule, sample.steps),
    )
