"""Code that runs in the measured process: phases of a case, memory measurement, the allocator, and quality."""
