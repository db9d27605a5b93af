"""`python -m echolora_kernels.benchmarks`: `echolora bench` where there is no typer."""

import os
import sys

from .command import main

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, RuntimeError, ValueError) as error:
        if os.environ.get("ECHOLORA_DEBUG"):
            raise
        print(f"echolora bench: {error}", file=sys.stderr)
        sys.exit(2)
