"""What the queue costs, beside Celery and Dramatiq, in one run on one broker."""

import sys
from pathlib import Path

# The task type `clock` is a distribution of its own that lies beside the benchmarks.
sys.path.insert(0, str(Path(__file__).parent / "plugin"))
