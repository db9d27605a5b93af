"""What everything costs on this machine, beside its peers and the floor: needs torch alone.

`cases` is the registry, `layers`, `quantised`, `losses`, `networks` and `steps` build a case's implementations, `check` compares them
with float64, `timing` and `memory` measure, `floor` and `rates` say what the device allows, `run` puts it together,
`report` and `plots` show it, and `command` is the command line: `echolora bench`, `python -m echolora_kernels.benchmarks`.
"""
