"""Values on several devices: meshes, placements, communication between ranks, and machines to plan for."""
