"""Let `python -m ringfold` be the command line."""

from .cli import main

raise SystemExit(main())
