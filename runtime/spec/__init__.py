"""Documents of the OCI runtime specification as values. Pure: nothing here touches the system."""
