"""What a training is made of: one step, its log, its checkpoints, trained cameras, several processes.

train.py puts these together. A step is a function of the seed and its number alone, so a training goes on from any state.
"""
