"""`python -m triptych` is the `triptych` command."""

import sys

from triptych.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
