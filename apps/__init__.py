"""What people run: the `attnsuite` command and the engine that turns folders of images into rows."""
