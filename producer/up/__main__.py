"""`python -m inferq.producer.up`: the supervisor of `inferq up --detach`."""

from __future__ import annotations

import sys

from inferq.producer.up.detached import main

sys.exit(main(sys.argv[1:]))
