"""The kinds of jobs: each says what to start, what to hear of it, and which metrics follow from the readings."""
