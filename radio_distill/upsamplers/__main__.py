"""`python -m radio_distill.upsamplers RECIPE [key=value ...]`: one rank of a training of any kind (`jobs.main`)."""

import sys

from ..jobs import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
