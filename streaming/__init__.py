"""Time and transport: from a source of sound to packets in a container. Knows AvatarModel, and no family of models."""
