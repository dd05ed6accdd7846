"""Files: how results are written whole, which folder belongs to which process, and how strangers' pictures are read."""
