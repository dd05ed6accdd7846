"""Where the networks are computed: what they are (architecture), on a CPU (cpu, cpu_kernels), on a GPU (gpu), and which
of the two (context).

Both backends offer the same names to network.py, which chooses. Nothing here knows of rays, scenes or files.
"""
