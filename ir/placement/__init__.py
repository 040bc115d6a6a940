"""Values on several devices: meshes, placements, and communication between ranks."""
