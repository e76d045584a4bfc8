"""The protocol between the runner and measured processes, and the marks of phases in a user's program."""
