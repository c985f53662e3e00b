"""Devices: processes that find each other, one mesh for every machine, and one rule for what lies
where.
"""

import functools
import os
import signal
import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cfg_jax.runtime import memory
from cfg_jax.types import UsageError

BATCH_AXES = ("data", "fsdp")
_COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's event, with its seconds
_LONG = 5.0  # seconds: beside a compilation of so many, filling holes costs little


# Of Google's TPUs v2 to 7x on the PCI bus; its network cards have the same vendor.
_TPU_VENDOR = "0x1ae0"
_TPU_DEVICES = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}


def _has_tpu(pci: str = "/sys/bus/pci/devices") -> bool:
    def says(device: epath.Path, name: str) -> str:
        file = device / name
        return file.read_text().strip() if file.exists() else ""

    devices = epath.Path(pci).iterdir() if epath.Path(pci).exists() else ()
    return any(
        says(d, "vendor") == _TPU_VENDOR and says(d, "device") in _TPU_DEVICES for d in devices
    )


def initialize_distributed(requested: bool, *, saves: bool = False) -> None:
    """Joins the other processes of a run, on a cluster that is detected or where it was requested.

    An explicit cluster is named by JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. SLURM and Open MPI steps of several processes, machines with TPUs, whose
    metadata name the pod's hosts, and Kubernetes' TPU_WORKER_HOSTNAMES are detected. Must be called
    before the first device is touched. Waits up to five minutes for the others; a process that dies
    later ends them all, at once where they exchange gradients, and after JAX's heartbeat time-out
    of 100 s at the latest. SIGTERM ends a process, but for a job that `saves` first: there JAX's
    preemption service hears it, and the job asks. Raises UsageError where no cluster can be joined.
    """
    env = os.environ
    wants_tpu = "tpu" in env.get("JAX_PLATFORMS", "tpu") and "TPU_SKIP_MDS_QUERY" not in env
    explicit = "JAX_NUM_PROCESSES" in env
    detected = (
        explicit
        or int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
        or ("TPU_WORKER_HOSTNAMES" not in env and wants_tpu and _has_tpu())
    )
    if not (requested or detected):
        return
    try:
        if explicit:
            jax.distributed.initialize(
                env.get("JAX_COORDINATOR_ADDRESS"),
                num_processes=int(env["JAX_NUM_PROCESSES"]),
                process_id=int(env["JAX_PROCESS_ID"]),
            )
        else:
            jax.distributed.initialize()
    except (KeyError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"could not join a cluster ({str(error).splitlines()[0]}): leave --distributed out on "
            "one machine, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from error
    # The service has taken the signal for itself, for good; only the main thread may take it back.
    if not saves and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def lost_another(error: Exception) -> bool:
    """Whether an exchange with another process failed, rather than something in this one."""
    said = str(error).lower()
    signs = ("connection", "gloo", "nccl", "heartbeat", "unavailable", "barrier")
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    return (
        several and isinstance(error, jax.errors.JaxRuntimeError) and any(s in said for s in signs)
    )


def split_cpu(batch_size: int, at_most: int | None = None) -> None:
    """Makes a CPU a small pod: as many XLA devices as the largest divisor of the batch up to its
    cores, or up to `at_most`.

    XLA shares a convolution badly among the threads of a device, so this is also what makes a CPU
    fast, but for steps whose devices meet too often (`Experiment.cpu_devices`).
    Devices stay as they are where they were chosen already, or once jax has started; other backends
    ignore it. Where there is nothing but a CPU, the process also keeps the memory that it frees
    (`memory.keep`), but for what a long compilation leaves (`memory.fill_holes`).
    """
    platforms = jax.config.jax_platforms
    if platforms == "cpu" if platforms else not (_has_tpu() or epath.Path("/dev/nvidia0").exists()):
        memory.keep()
        _fill_holes_after_compiling()
    if jax.config.jax_num_cpu_devices > 0 or "host_platform_device_count" in os.environ.get(
        "XLA_FLAGS", ""
    ):
        return
    if jax.distributed.is_initialized():
        # How many others share the batch is known before the backend starts only if it was said.
        if "JAX_NUM_PROCESSES" not in os.environ:
            return
        batch_size //= int(os.environ["JAX_NUM_PROCESSES"])
    allowed = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if allowed else os.cpu_count() or 1
    most = min(cores, at_most or cores)
    devices = max([n for n in range(1, most + 1) if batch_size % n == 0], default=1)
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # the backend is up: a notebook, say, that has used jax already
        return


@functools.cache  # a process listens once
def _fill_holes_after_compiling() -> None:
    def compiled(event: str, seconds: float, **_) -> None:
        if event == _COMPILED and seconds > _LONG and jax.default_backend() == "cpu":
            memory.fill_holes()

    jax.monitoring.register_event_duration_secs_listener(compiled)


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """For `jax.jit` of the programs that run long, on the devices of a mesh.

    XLA:CPU drops `jax.lax.optimization_barrier` before it decides what is computed twice; the
    models set some, and count on their being kept.
    """
    if platform(mesh) != "cpu":
        return None
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}


def keep_compiled(workdir: str) -> None:
    """What takes the compiler over a second is kept in WORKDIR/compiled, for the next start.

    Without effect on an exported file, or where JAX_COMPILATION_CACHE_DIR names another place.
    """
    workdir = epath.Path(workdir)
    if workdir.suffix == ".safetensors" or jax.config.jax_compilation_cache_dir:
        return
    where = workdir if "://" in str(workdir) else workdir.absolute()
    jax.config.update("jax_compilation_cache_dir", str(where / "compiled"))


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all processes, or those given, as ("data", "fsdp").

    Raises UsageError unless fsdp divides their number.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or len(devices) % fsdp:
        raise UsageError(
            f"train.fsdp={fsdp}: must divide the number of devices, which is {len(devices)} here."
        )
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp),
        BATCH_AXES,
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices,
    )


def platform(mesh: Mesh) -> str:
    """For what a program on this mesh is compiled: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, shapes):
    """For a pytree of shapes: the largest dimension that fsdp divides lies over it, if there is
    one.

    One rule for parameters, EMA and Adam's moments, so that an update never moves them.
    """
    fsdp = mesh.shape["fsdp"]

    def rule(leaf) -> NamedSharding:
        divisible = [d for d, n in enumerate(leaf.shape) if n % fsdp == 0 and n >= fsdp]
        if fsdp == 1 or not divisible:
            return replicated(mesh)
        where = max(divisible, key=lambda d: leaf.shape[d])
        return NamedSharding(mesh, PartitionSpec(*([None] * where), "fsdp"))

    return jax.tree.map(rule, shapes)


def whole(mesh: Mesh, dtypes, gradient_dtype: str | None = None):
    """A function of a pytree of arrays, for inside jit: each whole on every device, rounded to its
    dtype.

    Called once at the top of a program it is the one place where what lies over "fsdp" is gathered,
    and in the precision that is used. The layers give a gradient in the precision in which they
    were handed the parameter, and in that precision it is summed over the devices: `gradient_dtype`
    is the least for both, if there is to be one.
    """
    everywhere = replicated(mesh)

    def gather(tree):
        def one(leaf, dtype):
            leaf = jax.lax.with_sharding_constraint(leaf.astype(dtype), everywhere)
            return leaf.astype(jnp.promote_types(dtype, gradient_dtype or dtype))

        return jax.tree.map(one, tree, dtypes)

    return gather


def placed(shapes, shardings):
    """A pytree of shapes with the shardings that its arrays are to have."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def check_batch(mesh: Mesh, batch_size: int, parts: int = 1) -> None:
    """Raises UsageError unless the devices divide the global batch, and each of its parts."""
    unit = mesh.size * parts
    if batch_size < 1 or batch_size % unit:
        what = f"{mesh.size} devices that share it"
        what += f", times train.accumulate={parts}" if parts > 1 else ""
        raise UsageError(
            f"train.batch_size={batch_size}: must be a multiple of the {what}; "
            f"try {max(unit, round(batch_size / unit) * unit)}."
        )


def shard_local(mesh: Mesh, rows):
    """A global batch of which this process has its own rows: a pytree of numpy arrays [b, ...]."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), rows)


def shard(mesh: Mesh, rows):
    """A global batch of which every process has all rows: a pytree of numpy arrays [B, ...]."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index]), rows
    )


def gather(tree):
    """A pytree of sharded arrays as numpy arrays, whole on every process: all must call it."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def barrier(name: str) -> None:
    """Waits for the other processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def least(value: int) -> int:
    """The smallest of what the processes say: all must call it."""
    return int(np.min(multihost_utils.process_allgather(np.int64(value))))


def all_agree(ok: bool) -> bool:
    """Whether it is so on every process: all must call it."""
    return bool(np.all(multihost_utils.process_allgather(np.bool_(ok))))
