"""Low precision, all of it: ranges, Q/DQ placement, FP16, overflow, and the search within an accuracy budget."""
