"""`python -m inferq.producer.cli` is `inferq`."""

from inferq.producer.cli.main import main

main()
