"""Who computes: the contract, the arrays, and one folder for each backend."""
