"""A burst of 10 → 800 tasks/s for two minutes and back, on paper: `python -m benchmarks.burst`.

It writes the table in docs/deploy/sizing.md and the picture beside it. With `--check` it only fails if they are stale.

Tasks come at random (Poisson), and take the measured seconds of a worker with a spread. Workers take them first come,
first served. What decides the number of pods follows the published rules. The HorizontalPodAutoscaler looks every 15
seconds and keeps the number within a tolerance of 10 %. As in the component keda, it at most doubles it at a time (or
adds 8), and lowers it to the highest wish of the last 60 seconds. Idle pods go first, as with the scale-in guard. No
pod is lost.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

from inferq.producer.demand import Backlog

TASK_SECONDS = 64 / 1839.63
"""A NER task of 64 texts: `inferq, queue to stored result` in RESULTS.md, one slot."""
SPREAD = 0.5
"""Standard deviation of the logarithm of a task's seconds (assumed)."""
START_SECONDS = 10.0
"""From a pod's creation to its first task: 7.8 s from the process to `/readyz`, measured on a busy machine with 2
cores, and 2 s for the container (assumed)."""
NODE_SECONDS = 120.0
"""The same if its node has to be created (assumed)."""
HPA_SECONDS, TOLERANCE, STABLE_SECONDS = 15, 0.1, 60
CALM, BURST = 10.0, 800.0
"""Tasks per second."""
BEGIN, END, HOUR = 600, 720, 3600
"""The seconds of the burst, and of everything."""
MOST = 35
"""`inferq plan --rate 800/s --seconds 0.0348 --reserve 20%`, and the most pods of each rule."""

PAGE = Path(__file__).parents[1] / "docs/deploy/sizing.md"
PICTURE = PAGE.with_name("burst.svg")


class Seen(NamedTuple):
    """What an autoscaler knows: waiting tasks, tasks in hand, and the seconds that the first task has waited."""

    waiting: int = 0
    in_hand: int = 0
    oldest: float = 0.0


class Pod(NamedTuple):
    """When a pod is free next, and when it was ready for the first time."""

    free: float
    ready: float


Wish = Callable[[int, Seen], float]
"""The pods that a rule wishes at a second."""


@dataclass(frozen=True)
class Rule:
    """How the number of pods is decided.

    `scaled`: by the autoscaler; else it is what is wished, at once. `doubles`: it at most doubles at a time, or grows
    by 8. `start`: seconds until a new pod takes tasks. `least`: the fewest pods. `age`: of the
    figures that the autoscaler gets, in seconds.
    """

    name: str
    wish: Wish
    scaled: bool = True
    doubles: bool = True
    start: float = START_SECONDS
    least: int = 1
    age: int = 5


@dataclass
class Run:
    """What came of a rule. `waits` are those of the tasks of the burst, by the second in which they came."""

    rule: Rule
    pods: list[int] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)
    ended: int = 0

    @property
    def pod_hours(self) -> float:
        return sum(self.pods) / 3600

    def wait(self, percent: int) -> float:
        return quantiles([wait for _, wait in self.waits], n=100)[percent - 1]


def keda(_now: int, seen: Seen) -> float:
    """The formula of the component keda: four tasks for each worker, but never fewer workers than tasks in hand."""
    return max((seen.waiting + seen.in_hand) / 4, seen.in_hand)


def demand(target: float) -> Wish:
    """The rule of GET /v1/demand: the workers with which every waiting task starts within `target` seconds."""

    def wish(_now: int, seen: Seen) -> float:
        return Backlog(seen.waiting, seen.in_hand, oldest=seen.oldest, seconds=TASK_SECONDS).slots(target)

    return wish


def prescaled(now: int, seen: Seen) -> float:
    """The same with a cron trigger: all pods from a minute before the burst to its end."""
    return MOST if BEGIN - 60 <= now < END else keda(now, seen)


RULES = (
    Rule(f"fixed fleet for the peak, {MOST} pods", lambda _now, _seen: MOST, scaled=False, least=MOST),
    Rule("fixed fleet, 3 pods", lambda _now, _seen: 3, scaled=False, least=3),
    Rule("keda", keda),
    Rule("keda-demand, target 30 s", demand(30), age=10),
    Rule("keda, not limited to doubling", keda, doubles=False),
    Rule("keda, at least 5 pods", keda, least=5),
    Rule("keda, cron a minute before", prescaled),
    Rule("keda, each pod on a new node", keda, start=NODE_SECONDS),
)  # fmt: skip


@cache
def arrivals(seed: int = 1) -> Sequence[tuple[float, float]]:
    """Each task: when it comes, and the seconds that it takes."""
    chance, found = random.Random(seed), []
    mean = math.log(TASK_SECONDS) - SPREAD**2 / 2
    for begin, end, rate in ((0, BEGIN, CALM), (BEGIN, END, BURST), (END, HOUR, CALM)):
        now = begin + chance.expovariate(rate)
        while now < end:
            found.append((now, chance.lognormvariate(mean, SPREAD)))
            now += chance.expovariate(rate)
    return found


def simulate(rule: Rule, seed: int = 1) -> Run:
    """The hour under a rule."""
    run, tasks, queue = Run(rule), deque(arrivals(seed)), deque[tuple[float, float]]()
    pods = [Pod(0.0, 0.0)] * rule.least
    seen = deque([Seen()] * (rule.age + 1), rule.age + 1)
    wishes: deque[tuple[int, int]] = deque()
    for now in range(HOUR):
        if not rule.scaled or now % HPA_SECONDS == 0:
            _resize(pods, _wanted(rule, now, seen[0], len(pods), wishes), now, rule.start)
        while tasks and tasks[0][0] < now + 1:
            queue.append(tasks.popleft())
        while queue and (start := max(queue[0][0], pods[0].free)) < now + 1:
            came, seconds = queue.popleft()
            heapq.heapreplace(pods, Pod(start + seconds, pods[0].ready))
            run.ended += 1
            if BEGIN <= came < END:
                run.waits.append((came, start - came))
        busy = sum(pod.free > max(now + 1, pod.ready) for pod in pods)
        seen.append(Seen(len(queue), busy, now + 1 - queue[0][0] if queue else 0.0))
        run.pods.append(len(pods))
    return run


def _wanted(rule: Rule, now: int, seen: Seen, pods: int, wishes: deque[tuple[int, int]]) -> int:
    wish = rule.wish(now, seen)
    if not rule.scaled:
        return math.ceil(wish)
    close = abs(wish / pods - 1) <= TOLERANCE
    wishes.append((now, pods if close else math.ceil(wish)))
    while wishes[0][0] <= now - STABLE_SECONDS:
        wishes.popleft()
    wanted = wishes[-1][1]
    if wanted < pods:
        wanted = min(pods, max(number for _, number in wishes))
    limit = max(2 * pods, pods + 8) if rule.doubles else MOST
    return max(rule.least, min(wanted, MOST, limit))


def _resize(pods: list[Pod], wanted: int, now: int, start: float) -> None:
    while len(pods) < wanted:
        heapq.heappush(pods, Pod(now + start, now + start))
    if len(pods) > wanted:
        # As in Kubernetes, those that are not ready go first; then the idle ones, the longest idle first.
        pods.sort(key=lambda pod: (pod.ready <= now, pod.free))
        del pods[: len(pods) - wanted]
        heapq.heapify(pods)


# The table and the picture.


def table(runs: Sequence[Run]) -> str:
    """The figures, in Markdown."""
    columns = (
        *("pods", "most", "wait p50, s", "wait p99, s", "longest, s", "waits end after, s"),
        *("GPU hours, that hour", "GPU hours, a day"),
    )
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for run in runs:
        waits = [wait for _, wait in run.waits]
        over = max((came + wait - END for came, wait in run.waits if wait > 1), default=0.0)
        day = run.pod_hours + 23 * run.rule.least
        lines.append(
            f"| {run.rule.name} | {max(run.pods)} | {run.wait(50):.1f} | {run.wait(99):.1f} | {max(waits):.1f} "
            f"| {max(0.0, over):.0f} | {run.pod_hours:.1f} | {day:.0f} |"
        )
    return "\n".join(lines) + "\n"


_WIDTH, _LEFT, _RIGHT, _TOP, _HEIGHT, _GAP = 900, 60, 310, 30, 180, 60
_FROM, _TO = BEGIN - 120, END + 300
_LONGEST = 160.0
"""The most seconds in the picture: a fleet that is too small would flatten all others."""
_COLORS = ("#000000", "#999999", "#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#e69f00")
"""Colours that people with a colour vision deficiency can tell apart (Okabe and Ito)."""


def picture(runs: Sequence[Run]) -> str:
    """Pods over time, and the median wait of the tasks that came in the same 5 seconds, as SVG."""
    height = _TOP + 2 * _HEIGHT + _GAP + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for number, (title, top) in enumerate((("pods", 40.0), ("median wait by time of arrival, s", _LONGEST))):
        above = _TOP + number * (_HEIGHT + _GAP)
        parts += _axes(title, above, top)
        for run, color in zip(runs, _COLORS, strict=True):
            points = _steps(run) if number == 0 else _medians(run)
            path = " ".join(
                f"{_x(at):.0f},{above + _HEIGHT * (1 - value / top):.0f}"
                for at, value in points
                if value <= top
            )
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
    for number, (run, color) in enumerate(zip(runs, _COLORS, strict=True)):
        y = _TOP + 12 + 20 * number
        x = _WIDTH - _RIGHT + 20
        parts.append(f'<path d="M{x} {y - 4}h18" stroke="{color}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 24}" y="{y}">{run.rule.name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axes(title: str, above: int, top: float) -> Iterator[str]:
    below, right = above + _HEIGHT, _x(_TO)
    yield f'<rect x="{_x(BEGIN):.0f}" y="{above}" width="{_x(END) - _x(BEGIN):.0f}" height="{_HEIGHT}" fill="#eee"/>'
    yield f'<text x="{_LEFT}" y="{above - 8}" font-weight="bold">{title}</text>'
    for share in (0.0, 0.5, 1.0):
        y = below - _HEIGHT * share
        yield f'<path d="M{_LEFT} {y:.0f}H{right:.0f}" stroke="#ccc"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{top * share:.0f}</text>'
    for at in range(_FROM, _TO + 1, 60):
        yield f'<text x="{_x(at):.0f}" y="{below + 18}" text-anchor="middle">{(at - BEGIN) // 60}</text>'
    yield f'<text x="{right:.0f}" y="{below + 34}" text-anchor="end">minutes from the start of the burst (grey)</text>'


def _x(at: float) -> float:
    return _LEFT + (at - _FROM) / (_TO - _FROM) * (_WIDTH - _LEFT - _RIGHT)


def _steps(run: Run) -> Iterator[tuple[float, float]]:
    """The corners of the curve of pods."""
    yield _FROM, run.pods[_FROM]
    for at in range(_FROM + 1, _TO + 1):
        if run.pods[at] != run.pods[at - 1]:
            yield at, run.pods[at - 1]
            yield at, run.pods[at]
    yield _TO, run.pods[_TO]


def _medians(run: Run) -> list[tuple[float, float]]:
    slices: dict[int, list[float]] = {}
    for came, wait in run.waits:
        slices.setdefault(int(came) // 5, []).append(wait)
    return [(5 * number, sorted(waits)[len(waits) // 2]) for number, waits in sorted(slices.items())]


_MARK = "<!-- python -m benchmarks.burst -->\n"


def files() -> dict[Path, str]:
    """The text of each file."""
    runs = [simulate(rule) for rule in RULES]
    before, _, after = PAGE.read_text("utf-8").split(_MARK)
    return {PAGE: f"{before}{_MARK}\n{table(runs)}\n{_MARK}{after}", PICTURE: picture(runs)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is stale")
    check = parser.parse_args().check
    stale = {
        path: text for path, text in files().items() if not path.exists() or path.read_text("utf-8") != text
    }
    for path, text in stale.items():
        if check:
            sys.stderr.write(f"{path.name} is stale; run: python -m benchmarks.burst\n")
        else:
            path.write_text(text, "utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
