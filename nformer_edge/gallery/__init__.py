"""Images to features, and features to ranked galleries."""
