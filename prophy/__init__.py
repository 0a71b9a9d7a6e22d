"""The method: experts, branch, losses, priors, the sandbox. Knows nothing of Ray, DeepSpeed or HTTP."""
