"""The search for a config that meets the user's accuracy: what evaluates, ranks and decides."""
