"""What stands between Treadle and the outside: files, folders, text from strangers, and how errors read."""
