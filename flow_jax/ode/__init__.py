"""Integration of a flow: sampling, likelihood, guidance, and an SDE with the same marginals."""
