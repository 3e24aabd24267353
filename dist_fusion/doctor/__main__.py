"""`python -m dist_fusion.doctor`, under any launcher."""

import os
import sys

from dist_fusion.doctor import main

if __name__ == "__main__":
    code = main()
    # As in dist_fusion.train: threads of libraries may abort a rank that has ended well.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
