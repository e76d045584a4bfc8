"""This machine: its description, /proc, NVML, scratch folders, imports, and a program's signals and exit codes."""
