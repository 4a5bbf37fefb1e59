"""Property tests: hypothesis draws calls of the public functions and layers, `judge` knows what they should give."""
