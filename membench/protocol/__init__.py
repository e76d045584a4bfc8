"""What the runner and a measured process say to each other, and the marks of phases in a user's program."""
