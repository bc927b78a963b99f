"""``python -m tools.pretend_cuda``."""

import sys

from .command import main

sys.exit(main())
