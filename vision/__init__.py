"""Vision attention backbones and operators; importing this package registers every model with timm."""
