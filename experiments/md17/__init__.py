"""Real MD17, aspirin and ethanol with their original labels: Equiformer with and without DeNS."""
