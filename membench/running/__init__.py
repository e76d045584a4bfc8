"""The runner's side: sessions, the fork client, the observer, and metrics derived from what was read."""
