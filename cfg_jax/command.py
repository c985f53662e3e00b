"""A job's command line: flags, a config with overrides, and a user's mistake in one line."""

import logging as std_logging
import os
import re
import sys
import traceback
from collections.abc import Callable

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from cfg_jax import experiment, schema
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import UsageError


def run(main: Callable, config: Callable[[dict[str, str]], dict] | None = None) -> None:
    """Runs main() with absl's flags parsed, or main(config) where the job has a config.

    `config` makes it from the flags as typed ({"workdir": "DIR", ...}), before absl sees them,
    since its fields then become flags of their own: --config.FIELD=VALUE. Where it makes None, main
    is called without one. A UsageError becomes one
    line on standard error and exit status 2; absl's own flag errors keep theirs.
    """
    argv = list(sys.argv)
    try:
        if config is None or any(a.startswith(("--help", "-help")) for a in argv):
            holder = None
        else:
            argv, typed = _take_config(argv)
            holder = _define_config(config(typed), argv)
    except UsageError as error:
        _leave(error)

    def body(rest: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            # The libraries' own reports are for those who ask for them, with --verbosity=0: what
            # they found wrong is raised too, and is told here in a line.
            logging.set_verbosity(logging.FATAL)
            std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
        try:
            if len(rest) > 1:
                raise UsageError(f"{rest[1]!r} is not a flag: write --name=value.")
            if holder is None:
                main()
            else:
                main(experiment.SCHEMA.complete(holder.value.to_dict()))
        except UsageError as error:
            _leave(error)
        except Exception as error:
            if not jax.distributed.is_initialized():
                raise
            if meshes.lost_another(error):
                reason = str(error).splitlines()[0][:200]
                print(
                    f"stopped: another process is gone ({reason}); start all of them again, and "
                    "they go on from the last checkpoint.",
                    file=sys.stderr,
                )
            else:
                traceback.print_exc()
            leave(1)

    app.run(body, argv=argv)


def _define_config(config: dict | None, argv: list[str]):
    """The config as flags, with what argv says of its fields; None where there is none."""
    if config is None:
        return None
    base = experiment.SCHEMA.complete(_rename(config, argv), missing_ok=True)
    _check_paths(argv, base)
    sys.argv = argv  # where config_flags looks for the overrides
    return config_flags.DEFINE_config_dict("config", experiment.SCHEMA.overridable(base))


def _leave(error: UsageError) -> None:
    print(f"error: {error}", file=sys.stderr)
    leave(2)


def leave(status: int) -> None:
    """Ends the process; one of several at once, for JAX would have it wait for the others first,
    who wait for it.
    """
    if not jax.distributed.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# The flags beside --config that say which config is meant: here they may have a space for the =.
_WITH_PATHS = ("workdir", "samples", "make_reference", "checkpoint", "published")


def _take_config(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """argv without --config, and the flags typed; `--flag value` becomes `--flag=value`.

    The name of an entry alone stands for its section, here as in a config.
    """
    out, typed = argv[:1], {}
    rest = iter(argv[1:])
    for arg in rest:
        if re.fullmatch(r"--?(config(\.[\w.]+)?|" + "|".join(_WITH_PATHS) + ")", arg):
            arg = f"{arg}={next(rest, '')}"
        match = re.fullmatch(r"(--?config\.([\w.]+))=(.*)", arg, re.DOTALL)
        if match and match[2] in experiment.SCHEMA.tables:
            arg = f"{match[1]}.name={match[3]}"
        if match := re.fullmatch(r"--?(\w+)=(.*)", arg, re.DOTALL):
            typed[match[1]] = match[2]
            if match[1] == "config":
                continue
        out.append(arg)
    return out, typed


def _overrides(argv: list[str]) -> dict[str, str]:
    matches = (re.fullmatch(r"--?config\.([\w.]+)(?:=(.*))?", a, re.DOTALL) for a in argv)
    return {m[1]: m[2] or "" for m in matches if m}


def _rename(config: dict, argv: list[str]) -> dict:
    """Another entry of a table brings its own fields: those of the one it replaces are dropped."""
    outer_first = sorted(_overrides(argv).items(), key=lambda item: item[0].count("."))
    for path, value in outer_first:
        *parents, last = path.split(".")
        if last != "name" or ".".join(parents) not in experiment.SCHEMA.tables:
            continue
        section = config
        for parent in parents[:-1]:
            if isinstance(section.setdefault(parent, {}), str):  # a name for its section
                section[parent] = {"name": section[parent]}
            section = section[parent]
        given = section.get(parents[-1], {})
        if (given if isinstance(given, str) else given.get("name")) != value:
            section[parents[-1]] = {"name": value}
    return config


def _check_paths(argv: list[str], base: dict) -> None:
    for path in _overrides(argv):
        section = base
        walked = []
        for part in path.split("."):
            if not isinstance(section, dict) or part not in section:
                names = sorted(section) if isinstance(section, dict) else []
                raise schema.unknown_field(".".join([*walked, part]), names)
            section = section[part]
            walked.append(part)
