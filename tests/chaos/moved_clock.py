"""`inferq beat` whose clock runs faster, and can be set: `python -m tests.chaos.moved_clock FILE`.

The file has JSON: `began` and `speed` (clock seconds per second since `began`), and by how many days it is ahead.
libfaketime would move the clock of `sleep` and of TLS as well.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

from inferq.producer.nightly import beat
from inferq.producer.up.part import private_text


@dataclass(frozen=True)
class MovedClock:
    """Shows `began` (Unix time) at `began`, and from then on runs at `speed`, `days` ahead."""

    began: float
    speed: float
    days: float = 0.0

    def at(self, moment: float) -> datetime:
        """What it shows at a moment of Unix time."""
        shown = self.began + (moment - self.began) * self.speed
        return datetime.fromtimestamp(shown, UTC) + timedelta(days=self.days)

    def when(self, shown: datetime) -> float:
        """The moment of Unix time at which it shows this."""
        return self.began + ((shown - timedelta(days=self.days)).timestamp() - self.began) / self.speed

    def write(self, path: Path) -> None:
        private_text(path, json.dumps(asdict(self)))


def read_clock(path: Path) -> MovedClock:
    return MovedClock(**json.loads(path.read_text("utf-8")))


def main(path: str) -> None:
    from inferq.producer.cli.main import main as cli

    class Moved(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return read_clock(Path(path)).at(datetime.now(UTC).timestamp()).astimezone(tz)

    beat.datetime = Moved  # type: ignore[attr-defined]
    sys.argv = ["inferq", "beat"]
    cli()


if __name__ == "__main__":
    main(sys.argv[1])
