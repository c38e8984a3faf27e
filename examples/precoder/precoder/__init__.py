"""Learning the precoder for weighted sum rate, trained in parallel over xccl. After arXiv:2503.04497."""
