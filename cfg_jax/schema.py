"""Signatures as the schema of configs: what fields there are, their defaults, their types.

A config is a nested dict. A section with a `name` is an entry of a table, and its other fields are
that entry's keyword arguments; the name alone stands for a section of nothing else. A section
without one is a dataclass. Nothing here knows what they mean.
"""

import dataclasses
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ml_collections import config_dict

from cfg_jax.types import UsageError


def unknown(path: str, given: Any, known: Collection[str]) -> UsageError:
    """The one line for a name that is not one of those known."""
    close = difflib.get_close_matches(str(given), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return UsageError(f"{path}={given!r} is not known: there are {', '.join(sorted(known))}{hint}")


def unknown_field(path: str, known: Collection[str]) -> UsageError:
    """The one line for a field that is not in the config."""
    close = difflib.get_close_matches(path.rpartition(".")[2], known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    fields = f"there are {', '.join(sorted(known))}" if known else "it has no fields below it"
    return UsageError(f"config.{path} is no field: {fields}{hint}")


def entry(path: str, table: Mapping[str, Any], name: str) -> Any:
    """table[name], or the UsageError that says what there is."""
    if not isinstance(name, str) or name not in table:
        raise unknown(path, name, table)
    return table[name]


@dataclasses.dataclass(frozen=True)
class Schema:
    """tables and sections by dotted path; `bound`, by path, the arguments that no config gives.

    `scalars` are top-level fields with their defaults, `names` the entries of sections left out.
    """

    tables: Mapping[str, Mapping[str, Callable]]
    sections: Mapping[str, Callable]
    scalars: Mapping[str, Any]
    names: Mapping[str, str]
    bound: Mapping[str, Collection[str]]

    def complete(self, config: Mapping[str, Any], *, missing_ok: bool = False) -> dict[str, Any]:
        """The config as a plain dict with every field of every signature in it, tuples for lists.

        Raises UsageError for an unknown section, entry or field, and for one that is missing; with
        `missing_ok` that is None, for the command line to give.
        """
        top = {p for p in (*self.tables, *self.sections, *self.scalars) if "." not in p}
        for key in config:
            if key not in top:
                raise unknown_field(key, top)
        out = {**self.scalars, **{k: config[k] for k in self.scalars if k in config}}
        for path in sorted(top - set(self.scalars)):
            out[path] = self._section(path, config.get(path, {}), missing_ok)
        return out

    def _section(self, path: str, given: Any, missing_ok: bool) -> dict[str, Any]:
        if isinstance(given, str) and path in self.tables:
            given = {"name": given}
        if not isinstance(given, Mapping):
            raise UsageError(f"config.{path}={given!r} must be a section, with fields of its own.")
        fields = dict(given)
        if path in self.tables:
            table = self.tables[path]
            name = fields.pop("name", self.names.get(path))
            if name is None:
                raise UsageError(f"config.{path}.name is missing: one of {', '.join(table)}.")
            target, out = entry(f"config.{path}.name", table, name), {"name": name}
        else:
            target, out = self.sections[path], {}
        known = parameters(target, self.bound.get(path, ()))
        for key in fields:
            if key not in known:
                raise unknown_field(f"{path}.{key}", known)
        for key, (default, annotation) in known.items():
            if f"{path}.{key}" in self.tables:
                out[key] = self._section(f"{path}.{key}", fields.get(key, {}), missing_ok)
            elif default is not inspect.Parameter.empty and key not in fields:
                out[key] = default
            elif missing_ok or fields.get(key) is not None or default is None:
                out[key] = _convert(f"{path}.{key}", fields.get(key), annotation)
            else:
                raise UsageError(f"config.{path}.{key} is missing, and has no default.")
        return out

    def overridable(self, config: Mapping[str, Any]) -> config_dict.ConfigDict:
        """A complete config as the ConfigDict that command-line flags may change.

        A field that is None keeps the type that its signature gives it.
        """

        def convert(path: str, section: Mapping[str, Any]) -> dict[str, Any]:
            target = self.sections.get(path)
            if path in self.tables:
                target = self.tables[path][section["name"]]
            known = parameters(target, ()) if target else {}
            out = {}
            for key, value in section.items():
                below = f"{path}.{key}" if path else key
                if isinstance(value, Mapping):
                    out[key] = convert(below, value)
                elif value is None:
                    out[key] = config_dict.placeholder(_plain_type(known[key][1]))
                else:
                    out[key] = value
            return out

        return config_dict.ConfigDict(convert("", config))


def parameters(target: Callable, bound: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """{name: (default, annotation)} of what a config may say of an entry."""
    function = target.func if isinstance(target, functools.partial) else target
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    return {
        name: (p.default, hints.get(name, Any))
        for name, p in inspect.signature(target).parameters.items()
        if name not in bound and p.kind is not inspect.Parameter.VAR_KEYWORD
    }


def _plain_type(annotation: Any) -> type:
    """What a command-line value is read as: int for `int | None`, tuple for `tuple[int, ...]`."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    origin = typing.get_origin(annotation) or annotation
    return origin if origin in (int, float, str, bool, tuple) else object


def _convert(path: str, value: Any, annotation: Any) -> Any:
    """A config's value as its signature has it: lists as tuples, whole floats as floats."""
    kind = _plain_type(annotation)
    if value is None or kind is object:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is tuple and isinstance(value, list | tuple):
        args = [a for a in typing.get_args(annotation) if a is not type(None)]
        of = args[0] if typing.get_origin(annotation) is tuple else typing.get_args(args[0])[0]
        value = tuple(float(v) if isinstance(v, int) and of is float else v for v in value)
        if of in (int, float, str) and not all(isinstance(v, of) for v in value):
            raise UsageError(f"config.{path}={value!r}: values of type {of.__name__} are needed.")
        return value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"config.{path}={value!r}: a value of type {kind.__name__} is needed.")
    return value
