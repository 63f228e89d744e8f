"""Container images: read from layouts and archives, unpacked into bundles."""
