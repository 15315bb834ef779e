"""The campaign: runs that are killed again and again, started again with the same command, and compared."""

from __future__ import annotations

import copy
import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from . import checks
from .commands import Forked, Hangs, Spawned, Watched, all_gone, children, kill

PATIENCE = 600.0
"""Seconds after which a run is said to hang. An undisturbed one takes a few on an idle machine."""
_ENOUGH = 5
"""Problems after which a campaign ends."""
AIMED_AT = ("step", "save", "validation")
CHECKPOINT_EVERY = 4


@dataclass(frozen=True)
class Variant:
    """A kind of run."""

    workers: int
    switch: str
    ema: bool = True

    @property
    def name(self) -> str:
        """Short and without spaces."""
        return f"{self.workers}workers_{self.switch}{'' if self.ema else '_noema'}"


VARIANTS = tuple(itertools.starmap(Variant, itertools.product((2, 0), ("structure", "batch"))))


def settings_of(variant: Variant, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the YAML of a variant: two epochs of six steps, checkpoints in the middle of them."""
    settings = copy.deepcopy(settings)
    settings["dataset"]["train"]["transforms"]["dens"]["switch"] = variant.switch
    settings["optim"] |= {
        "eval_every": 5, "checkpoint_every": CHECKPOINT_EVERY, "num_workers": variant.workers
    }  # fmt: skip
    if not variant.ema:
        del settings["optim"]["ema_decay"]
    return settings


@dataclass(frozen=True)
class Strike:
    """How a process is killed, as it was drawn.

    Attributes:
        kind: ``call`` (in a chosen phase, at a chosen call of a function: the process kills itself),
            ``moment`` (from outside, at any moment) or ``worker`` (a loader worker, from outside).
        spawned: the process is a new `fairchem`, not a forked one.
        phase, occurrence, call: for ``call``, see `probe.Probe`.
        after: for the others, the number of changes of phase to wait for,
        delay: and the seconds to wait then.
        group: all processes of the run die at once, as where a machine fails.
    """

    kind: str
    spawned: bool = False
    phase: str = ""
    occurrence: int = 0
    call: int = 0
    after: int = 0
    delay: float = 0.0
    group: bool = False


@dataclass
class Kill:
    """What came of a strike.

    Attributes:
        variant: of the run.
        name: ``--timestamp-id``.
        strike: as it was drawn.
        struck: the phase in which it struck, or ``worker``.
        step: the step that the run was at.
        lost_steps: steps that had been made and have to be made again.
        half_written: files left half written beside the checkpoints.
    """

    variant: str
    name: str
    strike: Strike
    struck: str
    step: int
    lost_steps: int
    half_written: int


@dataclass
class Tally:
    """What a campaign has found."""

    kills: list[Kill] = field(default_factory=list)
    resumes: int = 0
    missed: int = 0
    """Strikes that came after the end of the run, or found no worker."""
    unreadable: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    not_resumed: list[str] = field(default_factory=list)
    """Runs that did not go on at the step after that of their checkpoint."""
    failures: list[str] = field(default_factory=list)
    """Runs that ended otherwise than they should have, or not at all."""
    leaked: int = 0
    """Processes that outlived the run that started them."""

    def problems(self) -> list[str]:
        """All that must not be."""
        leaked = [f"{self.leaked} processes outlived their runs"] if self.leaked else []
        return [*self.unreadable, *self.mismatches, *self.not_resumed, *self.failures, *leaked]

    def report(self) -> dict[str, Any]:
        """The numbers of a report."""
        lost = [kill.lost_steps for kill in self.kills]
        return {
            "kills": len(self.kills),
            "struck": dict(sorted(Counter(kill.struck for kill in self.kills).items())),
            "of_a_spawned_command": sum(kill.strike.spawned for kill in self.kills),
            "resumes": self.resumes,
            "lost_steps": {"total": sum(lost), "largest": max(lost, default=0)},
            "files_left_half_written": sum(kill.half_written for kill in self.kills),
            "strikes_that_missed": self.missed,
            "unreadable_or_lost_checkpoints": self.unreadable,
            "mismatches": self.mismatches,
            "not_resumed_where_the_checkpoint_is": self.not_resumed,
            "failures": self.failures,
            "processes_left": self.leaked,
            "each": [asdict(kill) for kill in self.kills],
        }


class Campaign:
    """Runs and kills in one folder.

    Args:
        folder: an empty folder for YAMLs, checkpoints and logs.
        settings: YAML of a small run of 12 steps, as a dictionary.
        seed: what is drawn is a function of it and of the number of the strike.
        variants: kinds of runs, which take turns.
        done: called after each kill.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        seed: int,
        variants: tuple[Variant, ...] = VARIANTS,
        done: Callable[[], Any] = lambda: None,
    ) -> None:
        self.folder, self.seed, self.variants, self.done = folder, seed, variants, done
        self.tally = Tally()
        self._ymls = {}
        self._sessions: list[int] = []
        for variant in variants:
            self._ymls[variant] = folder / f"{variant.name}.yml"
            self._ymls[variant].write_text(yaml.safe_dump(settings_of(variant, settings)))

    def run(self, kills: int, *, spawned: int, per_run: int = 5) -> Tally:
        """Kill so many times, and so many of them the spawned command; see `Tally` for what is found.

        Each run is killed ``per_run`` times before it may end, the last ones perhaps less.
        """
        with Forked() as forked, Spawned() as fresh:
            self._undisturbed(forked, fresh, also_spawned=spawned > 0)
            typical = self._survey(forked)
            numbers = itertools.count()
            runs = itertools.count()
            while len(self.tally.kills) < kills:
                number = next(runs)
                variant = self.variants[number % len(self.variants)]
                name = f"run{number}"
                wanted = min(per_run, kills - len(self.tally.kills))
                if self._one_run(variant, name, wanted, forked, fresh, numbers, typical, kills, spawned):
                    continue
                print(f"{name} went wrong:", *self.tally.problems()[-3:], sep="\n", flush=True)
                if len(self.tally.problems()) >= _ENOUGH:
                    break
            self.tally.leaked = len(all_gone(self._sessions, patience=30.0))
        return self.tally

    # ------------------------------------------------------------------ before the kills

    def _undisturbed(self, forked: Forked, fresh: Spawned, *, also_spawned: bool) -> None:
        for number, variant in enumerate(self.variants):
            self.to_the_end(forked, variant, f"whole_{variant.name}")
            if also_spawned and number == 0:
                self.to_the_end(fresh, variant, "spawned")
                self.compare(variant, "spawned")

    def _survey(self, forked: Forked) -> dict[str, Any]:
        """Count calls and time phases, in a run that is not killed."""
        run = self.start(forked, self.variants[0], "survey", watch={"count": True})
        begun = time.monotonic()
        status = forked.wait(run, PATIENCE)
        if status:
            raise RuntimeError(f"An undisturbed run ends with status {status}:\n{run.said()[-4000:]}")
        self.compare(self.variants[0], "survey")
        return {
            "calls": {phase: max(run.calls[phase]) for phase in AIMED_AT},
            "phases": run.phases,
            "seconds": (time.monotonic() - begun) / run.phases,
        }

    # ------------------------------------------------------------------ kills

    def _one_run(
        self,
        variant: Variant,
        name: str,
        wanted: int,
        forked: Forked,
        fresh: Spawned,
        numbers: Iterator[int],
        typical: dict[str, Any],
        kills: int,
        spawned: int,
    ) -> bool:
        """Start a run, kill it and start it again, and compare its end; returns whether to go on."""
        before: dict[str, int] = {}
        struck = 0
        while True:
            if struck == wanted:
                ok = self.to_the_end(forked, variant, name, before)
                return ok and self.compare(variant, name)
            number = next(numbers)
            # The spawned ones are spread evenly over all strikes.
            is_spawned = (number + 1) * spawned // kills > number * spawned // kills
            strike = draw(self.seed, number, variant, typical, spawned=is_spawned)
            command = fresh if strike.spawned else forked
            watch = None
            if not strike.spawned:
                aim = {"phase": strike.phase, "occurrence": strike.occurrence, "call": strike.call}
                watch = {"strike": aim if strike.kind == "call" else None}
            run = self.start(command, variant, name, watch=watch)
            try:
                hit = self._strike(command, run, strike)
                status = command.wait(run, PATIENCE)
            except Hangs:
                self.tally.failures.append(f"{name} hangs after {strike}: see {run.log}")
                return False
            before, wrong = checks.readable(
                self.folder / "checkpoints" / name, self._check_start(run, before)
            )
            self.tally.unreadable += [f"{name} after {strike}: {problem}" for problem in wrong]
            if status == 0:
                self.tally.missed += 1
                return self.compare(variant, name)
            expected = (1,) if strike.kind == "worker" else (-signal.SIGKILL,)
            if status not in expected or not hit:
                self.tally.failures.append(
                    f"{name} ended with status {status} after {strike}: {run.said()[-2000:]}"
                )
                return False
            struck += 1
            done = max(run.phase.completed, 0)
            folder = self.folder / "checkpoints" / name
            self.tally.kills.append(
                Kill(
                    variant=variant.name, name=name, strike=strike,
                    struck="worker" if strike.kind == "worker" else run.phase.name,
                    step=run.phase.step,
                    lost_steps=max(0, done - before.get("checkpoint.pt", 0)),
                    half_written=checks.half_written(folder),
                )
            )  # fmt: skip
            self.done()

    def _strike(self, command: Forked | Spawned, run: Watched, strike: Strike) -> bool:
        """Deal the blow; returns whether it hit, or will."""
        if strike.kind == "call":
            return True
        for watched in command.follow(run, PATIENCE):
            if watched.phases < strike.after:
                continue
            time.sleep(strike.delay)
            if strike.kind == "moment":
                kill(run.pid, group=strike.group)
                return True
            if workers := children(run.pid):
                kill(workers[strike.call % len(workers)])
                return True
        return False

    # ------------------------------------------------------------------ runs

    def start(
        self,
        command: Forked | Spawned,
        variant: Variant,
        name: str,
        *,
        watch: dict[str, Any] | None = None,
    ) -> Watched:
        """Give the command of a run, for the first time or again."""
        if (self.folder / "checkpoints" / name).exists():
            self.tally.resumes += 1
        arguments = [
            *("--mode", "train", "--config-yml", str(self._ymls[variant]), "--cpu"),
            *("--run-dir", str(self.folder), "--timestamp-id", name, "--print-every", "1"),
        ]
        run = command.start(arguments, self.folder, self.folder / f"{name}.log", watch)
        self._sessions.append(run.pid)
        return run

    def to_the_end(
        self,
        command: Forked | Spawned,
        variant: Variant,
        name: str,
        before: dict[str, int] | None = None,
    ) -> bool:
        """Give the command of a run and let it end; returns whether it did, and as it should.

        Args:
            command: how.
            variant: of the run.
            name: of the run.
            before: step of each checkpoint that is there; None to leave the run unwatched.
        """
        run = self.start(command, variant, name, watch={} if before is not None else None)
        try:
            status = command.wait(run, PATIENCE)
        except Hangs:
            self.tally.failures.append(f"{name} hangs: see {run.log}")
            return False
        if status:
            self.tally.failures.append(f"{name} ended with status {status}: {run.said()[-2000:]}")
            return False
        self._check_start(run, before or {})
        return True

    def _check_start(self, run: Watched, before: dict[str, int]) -> dict[str, int]:
        """A run that made a step began with the one after its checkpoint."""
        expected = before.get("checkpoint.pt", 0) + 1
        if run.first_step is not None and run.first_step != expected:
            self.tally.not_resumed.append(f"{run.log.stem} began at step {run.first_step}, not {expected}")
        return before

    def compare(self, variant: Variant, name: str) -> bool:
        """Return whether a run has the same end as the undisturbed one of its kind; note where it has not."""
        found = checks.mismatches(self.folder, f"whole_{variant.name}", name)
        self.tally.mismatches += [f"{name} ({variant.name}): {place}" for place in found]
        return not found


def draw(seed: int, number: int, variant: Variant, typical: dict[str, Any], *, spawned: bool) -> Strike:
    """Return the strike of this number: the same whenever it is drawn."""
    rng = random.Random(f"{seed}/{number}")
    kinds = ["moment"] if spawned else ["call", "call", "call", "moment"]
    kind = rng.choice(kinds + ["worker"] * (len(kinds) // 2 if variant.workers and not spawned else 0))
    phase = AIMED_AT[rng.randrange(3)]
    occurrence = rng.randint(1, 6 if phase == "step" else 2)
    call = rng.randint(1, typical["calls"][phase])
    after = rng.randint(1, typical["phases"] // (8 if spawned else 2))
    delay = rng.uniform(0, 2 * typical["seconds"])
    group = rng.random() < 0.3
    if kind == "call":
        return Strike(kind, phase=phase, occurrence=occurrence, call=call)
    return Strike(
        kind, spawned=spawned, after=after, delay=delay, group=group and kind == "moment",
        call=call if kind == "worker" else 0,
    )  # fmt: skip
