"""Whether the operators are as exact on this machine as plain torch: needs torch alone.

`trials` draws arguments, `suite` lists what is verified, `run` compares the backends with float64.
"""
