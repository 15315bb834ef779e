"""Generated data of several sizes: where DeNS pays, from what size on it does not, and what its settings do."""
