"""HTTP and nothing else: the OpenAI-compatible API over an AsyncEngine. Never sees a tensor."""
