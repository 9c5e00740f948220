"""The wire models: what each API takes, one file per API."""
