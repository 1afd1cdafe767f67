"""Which of our parameters is which tensor of another program's state dict, in both directions.

A map is a list of `Tensor`, one for each tensor of theirs. It is written as a few `Rule`s, matched against the paths of our parameters,
so it follows from the network's own shape: the same rules read a file, write one, and say (abstractly) what either must hold.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.model_directory import flatten

Shapes = dict[str, tuple[int, ...]]
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclass(frozen=True)
class Layout:
    """How a tensor of theirs holds one or several leaves of ours; `read` undoes `write`."""

    read: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    write: Callable[..., np.ndarray]


def _one(read: Callable[[np.ndarray], np.ndarray], write: Callable[[np.ndarray], np.ndarray]) -> Layout:
    return Layout(lambda a: (read(a),), write)


SAME = _one(lambda a: a, lambda a: a)
LINEAR = _one(lambda a: a.T, lambda a: a.T)  # [O,I]
CONV = _one(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))  # [O,I,H,W]
POINTWISE = _one(lambda a: a[..., 0, 0].T, lambda a: a.T[..., None, None])  # a 1x1 convolution [O,I,1,1] that is a matrix here
POINTWISE_1D = _one(lambda a: a[..., 0].T, lambda a: a.T[..., None])  # [O,I,1]


def fused(heads: int, kernel: Layout = LINEAR) -> Layout:
    """Queries, keys and values as one tensor whose rows are ordered by head, then by which of the three, then by channel: the order of
    ADM's first attention. `heads=1` is the order of most others: all queries, all keys, all values. `kernel` is the layout of one."""

    def read(a: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = a.reshape(heads, 3, -1, *a.shape[1:])
        return tuple(kernel.read(parts[:, i].reshape(-1, *a.shape[1:]))[0] if a.ndim > 1 else parts[:, i].reshape(-1) for i in range(3))

    def write(*leaves: np.ndarray) -> np.ndarray:
        rows = [kernel.write(leaf) if leaf.ndim > 1 else leaf for leaf in leaves]
        parts = [row.reshape(heads, 1, -1, *row.shape[1:]) for row in rows]
        return np.concatenate(parts, axis=1).reshape(-1, *rows[0].shape[1:])

    return Layout(read, write)


class Rule(NamedTuple):
    """Modules of ours (a pattern for the whole path, "/" between its parts) and where they are there (a template of the match).

    The leaf's own name follows: `kernel`, `scale` and `embedding` are theirs `weight`. A pattern that matches a path with its leaf names a
    single tensor, and the template then is its whole name. `layout` is that of kernels; norms and biases are the same everywhere, but for
    a layout of several leaves, which is of all.
    """

    pattern: str
    template: str | Callable[[re.Match[str]], str]
    layout: Layout = SAME
    parts: tuple[str, ...] = ()  # names of ours, last in the path and group `part` of the pattern, that one tensor joins, in its order


def nest(pattern: str, template: str | Callable[[re.Match[str]], str], inner: Iterable[Rule]) -> list[Rule]:
    """Rules of a block's modules, under each block that `pattern` matches; `template` is its place there. Groups must be named."""

    def joined(rule: Rule) -> Callable[[re.Match[str]], str]:
        return lambda match: f"{_expand(template, match)}.{_expand(rule.template, match)}"

    return [rule._replace(pattern=f"{pattern}/{rule.pattern}", template=joined(rule)) for rule in inner]


class Tensor(NamedTuple):
    """A tensor of theirs: its name, the leaves of ours that it holds, and how."""

    name: str
    leaves: tuple[str, ...]
    layout: Layout


KeyMap = list[Tensor]


def key_map(params: Mapping[str, Any], rules: Sequence[Rule], prefix: str = "") -> KeyMap:
    """The map of a tree of parameters, or of their shapes, each by the first rule that matches it.

    `prefix` stands before every name of theirs. Raises ValueError for a leaf without a rule: the format has no place for it.
    """
    found: dict[str, dict[int, str]] = {}
    layouts: dict[str, Layout] = {}
    for leaf in flatten(params):
        name, part, layout = _match(leaf, rules)
        found.setdefault(prefix + name, {})[part] = leaf
        layouts[prefix + name] = layout
    return [Tensor(name, tuple(parts[i] for i in sorted(parts)), layouts[name]) for name, parts in found.items()]


def _match(leaf: str, rules: Sequence[Rule]) -> tuple[str, int, Layout]:
    module, _, last = leaf.rpartition("/")
    for rule in rules:
        if match := re.fullmatch(rule.pattern, leaf):
            return _expand(rule.template, match), 0, rule.layout
        if last in _LEAVES and (match := re.fullmatch(rule.pattern, module)):
            part = rule.parts.index(match["part"]) if rule.parts else 0
            layout = rule.layout if rule.parts or last == "kernel" else SAME
            return f"{_expand(rule.template, match)}.{_LEAVES[last]}", part, layout
    raise ValueError(f"{leaf} has no counterpart there")


def _expand(template: str | Callable[[re.Match[str]], str], match: re.Match[str]) -> str:
    return match.expand(template) if isinstance(template, str) else template(match)


def their_shapes(keys: KeyMap, ours: Mapping[str, Any]) -> Shapes:
    """Shapes of their tensors, from those of our parameters (a tree of anything with a `shape`); nothing large is allocated."""
    empty = np.zeros((), np.bool_)
    leaves = flatten(ours)
    return {t.name: t.layout.write(*(np.broadcast_to(empty, leaves[leaf].shape) for leaf in t.leaves)).shape for t in keys}


def problems(keys: KeyMap, ours: Mapping[str, Any], theirs: Mapping[str, tuple[int, ...]], ignored: Sequence[str] = ()) -> list[str]:
    """Every tensor that is missing, unexpected or of another shape, in words.

    Args:
      ours: a tree of leaves with a `shape`.
      theirs: shapes of the file's tensors.
      ignored: patterns of whole names of theirs that no network here reads.
    """
    wanted = their_shapes(keys, ours)
    wrong = [f"{name} is missing" for name in wanted if name not in theirs]
    wrong += [f"{n} is {list(theirs[n])}, not {list(shape)}" for n, shape in wanted.items() if n in theirs and tuple(theirs[n]) != shape]
    return wrong + [f"{n} is not expected" for n in theirs if n not in wanted and not any(re.fullmatch(p, n) for p in ignored)]


def check(keys: KeyMap, ours: Mapping[str, Any], theirs: Mapping[str, tuple[int, ...]], where: str, ignored: Sequence[str] = ()) -> None:
    """Raises UserError with one list of all `problems`."""
    if wrong := problems(keys, ours, theirs, ignored):
        raise UserError(f"{where} does not fit its configuration ({len(wrong)} tensors): {'; '.join(wrong)}")


def under(part: str, keys: KeyMap) -> KeyMap:
    """The same map for parameters that lie in a larger tree, under `part`."""
    return [t._replace(leaves=tuple(f"{part}/{leaf}" for leaf in t.leaves)) for t in keys]


def read(keys: KeyMap, tensor: Callable[[str], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Our leaves one after the other, each once; `tensor` gives one of theirs by name.

    Raises UserError where several tensors hold the same leaves and differ.
    """
    first: dict[tuple[str, ...], Tensor] = {}
    for t in keys:
        original = first.setdefault(t.leaves, t)
        if original is not t and not np.array_equal(tensor(t.name), tensor(original.name)):
            raise UserError(f"{t.name} differs from {original.name}: here they are one, so these weights have no counterpart")
    for t in first.values():
        yield from zip(t.leaves, t.layout.read(tensor(t.name)), strict=True)


def write(keys: KeyMap, leaf: Callable[[str], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors one after the other; `leaf` gives one of ours by its path."""
    for t in keys:
        yield t.name, t.layout.write(*(leaf(path) for path in t.leaves))
