"""Records shown: tables, the page, plots, exports, and summaries for CI services."""
