"""Ferry's OCI container runtime: a short-lived, single-threaded process for each verb."""

__version__ = "0.1.0"
OCI_VERSION = "1.2.0"
