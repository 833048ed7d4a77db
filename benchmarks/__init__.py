"""The overhead of the queue, compared with Celery and Dramatiq in one run on one broker."""

import sys
from pathlib import Path

# The task type `clock` is a separate distribution in the benchmarks' folder.
sys.path.insert(0, str(Path(__file__).parent / "plugin"))
