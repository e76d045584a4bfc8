"""Tables, the page, pictures, documents and files for CI services. Reads records and judgements; measures nothing."""
