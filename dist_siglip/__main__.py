"""``python -m dist_siglip``: the same as the ``dist-siglip`` command."""

import sys

from dist_siglip.cli import main

if __name__ == "__main__":
    sys.exit(main())
