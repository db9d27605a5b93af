"""The command `echolora`."""
