"""Reports of `treadle explain`: fusion, layouts, storage, memory, the decoding step and sharding, one file each."""
