"""Images in, rows out: sources, decoding, stages, engines, sinks and the ledger that lets any run go on."""
