"""The kernel by ctypes: one function for each system call, by its man-2 name. `const` and `procfs` are pure."""
