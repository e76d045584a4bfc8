"""Records, the one table of metrics, their schema and files, and records beside each other."""
