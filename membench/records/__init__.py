"""Records of measurements: their metrics, schema and files, and the comparison of records with each other."""
