"""A folder of files that travels in the package; this file lets importlib.resources find it (genre_nb.core)."""
