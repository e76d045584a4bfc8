"""Inside the measured process: a case's stages, the meter, the allocator, what holds memory, quality."""
