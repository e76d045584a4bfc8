"""Suites from TOML files or Python: their schema, expansion into cases, rules, and the selection of cases."""
