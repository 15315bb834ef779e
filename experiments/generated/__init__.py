"""Generated data of several sizes: where DeNS pays, where not, and what its settings do."""
