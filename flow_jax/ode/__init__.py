"""Integration of a flow: sampling, likelihood, guidance, and the SDE with the same marginals."""
