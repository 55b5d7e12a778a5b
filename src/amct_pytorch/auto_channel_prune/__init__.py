"""Search for the share of each layer's channels to prune: sensitivities, search, complexity."""
