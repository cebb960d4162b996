"""`attnsuite demo`: a web page for each family of methods, and a home that holds them all."""
