"""`python -m panterra.cli`."""

import sys

from panterra.cli import main

sys.exit(main())
