"""Files for the OC20 and OC22 leaderboards: what they must hold, building them, checking them."""
