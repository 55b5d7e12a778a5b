"""What the user asked for: .cfg and JSON files, checked, as one config per layer."""
