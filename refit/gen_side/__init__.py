"""The generator side: vLLM's loader described as holdings, and a refit as a transaction on a live worker."""
