"""`python -m tq` is `tq`."""

from tq.cli import main

main()
