"""`python -m producer.cli` is `inferq`."""

from producer.cli.main import main

main()
