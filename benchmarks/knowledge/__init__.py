"""How many facts a model of each kind learns: dense, mixture of experts, n-gram table, memory."""
