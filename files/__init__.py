"""Access to the outside: files, folders, untrusted text, and the form of errors."""
