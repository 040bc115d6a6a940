"""Where values lie on several devices: meshes, placements, where ranks meet, machines that are planned for."""
