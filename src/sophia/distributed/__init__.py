"""Several processes: process groups, collectives, wrappers that scale gradients, shards. Imports nothing of
ours.
"""
