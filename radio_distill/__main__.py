"""`python -m radio_distill` is `radio-distill`."""

import sys

from .cli import main

sys.exit(main())
