"""Every operator on sizes of which one is 0, each in a process of its own; prints one JSON line a case.

Memory that nothing has written is NaN here, so that a result which was left as it was allocated shows.

    python tests/native/empty_cases.py
"""

import json
import os

import torch
from operator_cases import NETWORKS, OPERATORS, call, make, schema

SIZES = {"no samples": {"n": 0}, "no positions": {"t": 0}, "no input": {"d_in": 0}, "no output": {"d_out": 0}}


def computed(operator: str, sizes: dict) -> str:
    """What is wrong with the results; nothing where they are right: sums over nothing are 0."""
    torch.manual_seed(0)
    arguments = make(operator, **sizes)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    results = call(operator, arguments)
    for name, result in results.items():
        if not result.isfinite().all():
            return f"result {name} of shape {list(result.shape)} was not written"
    no_rows = operator != "dora_norm" and ("n" in sizes or ("t" in sizes and operator not in NETWORKS))
    if left := [name for name, result in results.items() if no_rows and result.any()]:
        return f"sums over no rows are not 0: {left}"
    changed = [
        name for name, value in before.items() if name not in results and not torch.equal(arguments[name], value)
    ]
    return f"changed: {changed}" if changed else ""


def in_a_child(operator: str, sizes: dict) -> str:
    """`computed`, or how the process ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = computed(operator, sizes)
        except Exception as error:  # reported, not raised: the caller wants every case
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as text:
        said = text.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said if status == 0 else f"the process ended with {status}"


def main() -> None:
    schema("drop")  # loads the library, once for all children
    torch.set_num_threads(1)  # nothing to fork but this thread
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for operator in OPERATORS:
        for label, sizes in SIZES.items():
            print(json.dumps([operator, label, in_a_child(operator, sizes)]), flush=True)


if __name__ == "__main__":
    main()
