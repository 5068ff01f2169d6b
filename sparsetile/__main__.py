"""`python -m sparsetile`: the command line."""
import sys

from sparsetile.autotune.cli import main

sys.exit(main())
