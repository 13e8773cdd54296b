"""The command line and the daemon; alone reads settings files, environment and signals."""

VERSION = "0.1.0"
"""Of the distribution; a test keeps it equal to pyproject.toml, since asking the installed metadata costs more."""
