"""Attention of one decode row of each sequence, straight from the caches; one call is all of a layer's attention."""
