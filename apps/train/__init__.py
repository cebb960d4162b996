"""`attnsuite train`: any network of the suite or of timm learns labelled pictures."""
