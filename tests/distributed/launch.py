"""Starting processes as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def torchrun(*command, timeout: float = 250) -> subprocess.CompletedProcess:
    """`torchrun --nproc-per-node 2 COMMAND`, ended if it hangs."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*launcher, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        printed, errors = process.communicate(timeout=timeout)
    finally:
        process.terminate()  # it ends its processes, which a kill would leave behind
        process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, printed, errors)
