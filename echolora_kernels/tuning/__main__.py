"""`python -m echolora_kernels.tuning`: `echolora tune` where there is no typer."""

import sys

from .command import main

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"echolora tune: {error}", file=sys.stderr)
        sys.exit(2)
