"""Which way of computing a large product is fastest on this machine's GPU: needs torch and Triton alone.

`shapes` knows the linears of models, `request` makes problems of them, `ways` lists the ways to compute one problem and
compares them with float64, `timing` times, `select` picks, `table` keeps the picks in the file that the Triton backend
reads, `run` goes through the problems, `report` shows what was found, and `command` is the command line:
`echolora tune`, `python -m echolora_kernels.tuning`.
"""
