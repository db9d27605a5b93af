"""Fine-tuning a causal language model from end to end: data, the loop, checkpoints, evaluation, results.

`run` ties the pieces together; the command line (`echolora train`) only parses and shows.
"""
