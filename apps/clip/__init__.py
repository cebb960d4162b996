"""CLIP on the command line: labels in words, features that words can be compared with, and search by words."""
