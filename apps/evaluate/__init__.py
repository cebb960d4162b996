"""`attnsuite evaluate`: how often a network is right on labelled pictures, as they are and corrupted."""
