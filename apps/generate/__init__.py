"""`attnsuite generate`: text to images with attention guidance, each picture holding what it takes to draw it again."""
