"""The parts of a training: steps, logs, checkpoints, trained cameras and parallel processes.

train.py combines them. A step depends only on the seed, its number and the current state, so any state can be resumed.
"""
