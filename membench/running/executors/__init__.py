"""Where jobs run: on this machine, or elsewhere by the same interface."""
