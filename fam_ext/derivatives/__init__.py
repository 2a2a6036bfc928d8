"""Which of torch's derivatives can be trusted three times over, and right ones for those that cannot."""
