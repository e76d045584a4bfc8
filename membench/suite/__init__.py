"""What a suite says, from a TOML file or Python, and the cases that it expands to; its rules and its selection."""
