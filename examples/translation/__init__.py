"""Translation by an encoder-decoder transformer: prepare, train, evaluate, translate."""
