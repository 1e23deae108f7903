"""Studies: a grid of cells, its results, its verdict and its report."""
