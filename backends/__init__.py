"""The computation of the networks: their sizes (architecture), a CPU's and a GPU's code, and the choice (context).

cpu and gpu offer the same names; network.py takes one of them. Nothing here knows of scenes or files.
"""
