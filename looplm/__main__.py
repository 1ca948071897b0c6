"""`python -m looplm` is the `looplm` command."""

from looplm.cli import main

main()
