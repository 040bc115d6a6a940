"""What `treadle explain` tells: fusion, layouts, storage, memory, and the step of generation; a file each."""
