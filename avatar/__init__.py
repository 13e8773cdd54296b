"""The mathematics of a speaking picture: networks, sampling, caches and where they are placed."""
