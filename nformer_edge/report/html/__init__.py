"""Results as one HTML page: nothing here measures or computes."""
