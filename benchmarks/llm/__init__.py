"""Parts of the benchmark llm_chain."""
