"""Run the supervisor."""

import sys

from toile.cli.platform.supervisor import main

if __name__ == "__main__":
    sys.exit(main())
