"""What this machine is and shows: its description, /proc, NVML, scratch folders, a program's signals and exit codes."""
