"""Core: vectors, updates, keyed draws, bytes and files; NumPy alone."""
