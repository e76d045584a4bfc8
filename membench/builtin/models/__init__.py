"""Models: architectures built from a configuration, pretrained ones, and small trained ones."""
