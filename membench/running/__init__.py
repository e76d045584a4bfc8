"""Running jobs from the parent process: sessions, executors, the runner, the observer, deriving metrics."""
