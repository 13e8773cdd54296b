"""The command line and the daemon; alone reads settings files, environment and signals."""
