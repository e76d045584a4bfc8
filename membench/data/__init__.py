"""Training data: sources of text and samples, how rows of tokens are stored, and how they are read in batches."""
