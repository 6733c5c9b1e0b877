"""`python -m memcompile`."""

from memcompile.cli import main

raise SystemExit(main())
