"""What do our kernels and our encoder change inside vLLM: throughput, latency, and the text."""
