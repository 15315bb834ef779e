"""Which frames belong together, what they are called, and which split they go to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fairchem_dens.data.from_ase.parts import Part
from fairchem_dens.data.from_ase.settings import Settings
from fairchem_dens.data.from_ase.sources import Source
from fairchem_dens.randomness import generator

SPLITS = ("train", "val", "test")
_INTEGER = re.compile(r"(?:random)?(\d{1,18})")
"""OC20 calls its systems random1000100; its tools want the number."""


@dataclass(frozen=True)
class Systems:
    """The systems of all frames.

    Attributes:
        names: of each system.
        of_frame: (n,) place of a frame's system in `names`.
        rules: which rule named how many frames.
    """

    names: list[str]
    of_frame: np.ndarray
    rules: dict[str, int]


def group(sources: Sequence[Source], parts: Sequence[Part], rule: str) -> Systems:
    """Tell which system each frame belongs to.

    Raises:
        ValueError: ``regex:`` does not match a path.
    """
    places: dict[str, int] = {}
    rules: Counter[str] = Counter()
    of_frame = []
    for source, part in zip(sources, parts, strict=True):
        if len(part.frames) == 0:
            of_frame.append(np.empty(0, dtype=np.int64))
            continue
        named, composition = part.frames["system"], part.frames["composition"]
        pairs, inverse = np.unique(np.stack([named, composition]), axis=1, return_inverse=True)
        counts = np.bincount(inverse.ravel(), minlength=pairs.shape[1])
        found = []
        for (name, formula), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
            given = part.names[name] if name >= 0 else None
            system, applied = _system(source, part, rule, given, part.compositions[formula])
            rules[applied] += count
            # No slash: relaxations are written to files of this name.
            found.append(places.setdefault(system.replace("/", ":"), len(places)))
        of_frame.append(np.array(found, dtype=np.int64)[inverse.ravel()])
    return Systems(list(places), np.concatenate(of_frame), dict(rules))


def _system(source: Source, part: Part, rule: str, given: str | None, formula: str) -> tuple[str, str]:
    """Return the name of a system and what made it."""
    kind, _, argument = rule.partition(":")
    if kind == "file":
        return source.name, "file"
    if kind == "formula":
        return formula, "formula"
    if kind == "regex":
        match = re.search(argument, str(source.path))
        if match is None:
            raise ValueError(f"'--split-by {rule}' matches nothing in '{source.path}'.")
        return next((found for found in match.groups() if found), match.group()), "regex"
    if given is not None:
        return given, "name in the frame"
    if part.database or len(part.frames) == 1:
        return formula, "formula of single structures"
    return source.name, "file of a trajectory"


def number_frames(parts: Sequence[Part], systems: Systems, settings: Settings) -> np.ndarray:
    """Return the fid (n,) of each frame within its system.

    It is what the frame says, else its number in the file. Where a rule joined several files to one system,
    the numbers go on from file to file.
    """
    numbers = np.concatenate([part.frames["number"] for part in parts])
    given = np.concatenate([part.frames["fid"] for part in parts])
    if settings.split_by == "system":
        in_frame = np.concatenate([part.frames["system"] for part in parts]) >= 0
    else:
        in_frame = np.zeros(len(numbers), dtype=bool)
    fids = np.where(in_frame & (given >= 0), given, numbers)
    following = np.zeros(len(systems.names), dtype=np.int64)
    start = 0
    for part in parts:
        here = np.arange(start, start := start + len(part.frames))
        counted_on = here[~in_frame[here]]
        members = systems.of_frame[counted_on]
        after = following.copy()
        np.maximum.at(after, members, following[members] + numbers[counted_on] + 1)
        fids[counted_on] += following[members]
        following = after
    return fids


def refuse_duplicates(
    sources: Sequence[Source], parts: Sequence[Part], systems: Systems, fids: np.ndarray
) -> None:
    """Raise if two frames have the same system and fid.

    Raises:
        ValueError: names both frames.
    """
    order = np.lexsort((fids, systems.of_frame))
    same = (np.diff(systems.of_frame[order]) == 0) & (np.diff(fids[order]) == 0)
    if not same.any():
        return
    place = int(same.argmax())
    ends = np.cumsum([len(part.frames) for part in parts])

    def says(frame: int) -> str:
        source = int(np.searchsorted(ends, frame, side="right"))
        start = ends[source] - len(parts[source].frames)
        return f"frame {parts[source].frames['number'][frame - start]} of '{sources[source].path}'"

    one, other = sorted(order[place : place + 2].tolist())
    raise ValueError(
        f"{says(one)[0].upper()}{says(one)[1:]} and {says(other)} are both fid {fids[one]} of the system "
        f"'{systems.names[systems.of_frame[one]]}', by what the frames say. Give one of the files, or number "
        "the frames in their info ('fid'), or take each file for a system (--split-by file)."
    )


def stored_ids(names: Sequence[str]) -> list[int] | list[str]:
    """Return the ``sid`` of each system: the number in its name if each has one of its own, else the name.

    A batch holds either numbers or names, so it is one for all.
    """
    matches = [_INTEGER.fullmatch(name.rpartition(":")[2]) for name in names]
    numbers = [int(match.group(1)) for match in matches if match is not None]
    if len(numbers) == len(names) and len(set(numbers)) == len(numbers):
        return numbers
    return list(names)


def assign(names: Sequence[str], settings: Settings) -> dict[str, str]:
    """Assign systems to splits.

    Systems are put in an order that depends on the seed and their own names alone; val takes its share from
    one end and test from the other. More systems therefore move few of those that were there.

    Returns:
        The split of each name.

    Raises:
        ValueError: there are too few systems.
    """
    val, test = (_count(size, len(names)) for size in (settings.val, settings.test))
    if val + test >= len(names):
        raise ValueError(
            f"There {'is' if len(names) == 1 else 'are'} {len(names)} system{'s' if len(names) != 1 else ''} "
            f"({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}), and '--val {settings.val} "
            f"--test {settings.test}' leave none of them to train on. Frames of one system are alike, so "
            "they stay together: give more systems, say what a system is (--split-by), or ask for less "
            "(--val 0)."
        )
    ordered = sorted(names, key=lambda name: (_draw(settings.seed, name), name))
    splits = dict.fromkeys(ordered, "train")
    splits.update(dict.fromkeys(ordered[:val], "val"))
    splits.update(dict.fromkeys(ordered[len(ordered) - test :], "test"))
    return splits


def _count(size: float | int, systems: int) -> int:
    if isinstance(size, float):
        return max(1, round(size * systems)) if size > 0 else 0
    return size


def _draw(seed: int, name: str) -> float:
    return float(generator(seed, content=[b"split of a system", name.encode()]).random())
