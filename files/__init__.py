"""Files: atomic writing of results, locking of run folders, and safe reading of pictures."""
