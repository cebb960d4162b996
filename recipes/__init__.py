"""The worlds and the training behind the checkpoints that ship in `weights/`; not part of the installed package."""
