"""Several runs of one config under named overrides, and their table and figure."""
