"""One refit round, its reports and its faults, and the training loop that uses it. The only room with Ray."""
