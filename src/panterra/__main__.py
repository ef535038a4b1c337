"""`python -m panterra`, which torchrun starts too."""

import sys

from panterra.cli import main

sys.exit(main())
