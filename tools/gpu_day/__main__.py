"""``python -m tools.gpu_day``."""

import signal
import sys

from .command import main

if __name__ == "__main__":
    # a job leads a session of its own and would outlive this process, were that ended without a word
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
