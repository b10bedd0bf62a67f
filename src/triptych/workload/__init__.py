"""Work for an engine: documents with facts to find, and what an engine makes of them."""
