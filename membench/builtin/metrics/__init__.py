"""Quality metrics that a suite may ask for."""
