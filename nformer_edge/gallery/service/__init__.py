"""A gallery over HTTP: an API, a page to look with, limits, roles and measurements. Needs the extra ``serve``."""
